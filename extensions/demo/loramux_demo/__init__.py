"""A show of everything on this machine, for people."""
