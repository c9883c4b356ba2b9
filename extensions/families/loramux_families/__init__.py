"""Families of decoders that few have, or whose routers or attention the core does not have."""
