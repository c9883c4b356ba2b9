"""Offline inference: a base and its adapters in the process of a program."""
