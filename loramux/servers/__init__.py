"""What other programs make of an adapter, as rules that are data: `rules.toml`."""
