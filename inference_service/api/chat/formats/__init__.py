"""The formats of families' tool calls and reasoning: one file a dialect."""
