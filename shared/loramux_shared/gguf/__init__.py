"""GGUF files as bases: what they hold, as the files of a checkpoint, and their blocks."""
