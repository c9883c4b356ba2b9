"""A conversation becomes a summary of it: ``POST /v1/responses/compact``."""
