"""A build: fetch, validate, convert, publish."""
