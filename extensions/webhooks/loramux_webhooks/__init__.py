"""Webhooks of a hub, which update adapters."""
