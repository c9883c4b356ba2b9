"""Composition: from settings and a store to a service that is ready."""
