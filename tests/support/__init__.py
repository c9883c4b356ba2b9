"""Shared parts of tests: servers, fakes, small models and adapters."""
