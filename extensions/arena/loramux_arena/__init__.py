"""Versions that answer the same questions: `contest` asks, `scores` and `judge` score, `standings` compares."""
