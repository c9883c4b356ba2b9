"""The lineage of bases, as a hub tells it."""
