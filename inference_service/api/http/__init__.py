"""The HTTP APIs: a room for each, on one wire."""
