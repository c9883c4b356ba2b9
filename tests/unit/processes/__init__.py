"""Tests of the channel to API processes."""
