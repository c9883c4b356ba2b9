"""A request on its way: its bounds, its terms, its answers, and who watches it."""
