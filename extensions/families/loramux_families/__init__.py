"""Families of decoders whose routers or attention the core does not have."""
