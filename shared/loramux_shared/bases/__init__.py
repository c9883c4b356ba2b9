"""Bases and the families that are served: the one reader of ``config.json``, which both services use."""
