"""The engine: scheduling, memory, and the step."""
