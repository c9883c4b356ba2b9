"""The extension `meter`: metrics of a builder."""
