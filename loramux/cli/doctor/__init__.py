"""A look at what is installed, what a replica would run on, and what fits."""
