"""What a base is and which bases are served: the one reading of ``config.json``, which both services ask."""
