"""Tests of API processes beside the engine's process."""
