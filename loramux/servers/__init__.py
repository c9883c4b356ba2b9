"""Rules about other programs that serve adapters, as data: `rules.toml`."""
