"""Plain nouns without torch."""
