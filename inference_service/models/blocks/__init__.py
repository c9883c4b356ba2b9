"""The blocks of layers, with their weights: each returns what is added to the hidden rows."""
