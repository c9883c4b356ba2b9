"""A tier below the key-value cache: blocks that leave it are kept, and copied back instead of computed."""

from loramux_tier.opening import open_tiers

__all__ = ["open_tiers"]
