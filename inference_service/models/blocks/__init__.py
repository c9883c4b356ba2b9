"""What layers are made of, with their weights: each returns what is added to the hidden rows."""
