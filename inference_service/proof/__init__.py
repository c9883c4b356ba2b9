"""The replay of an adapter's proof: what is served is what was trained."""
