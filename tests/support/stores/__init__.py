"""Stores of tests: with bundles in them, slow, away or damaged, or used by builders that die or take turns."""
