"""Versions compared on examples: `scoring` asks, `comparison` compares; `training` pushes checkpoints."""
