"""A conversation, whatever API it came through: what is asked, what models write, and how it is read."""
