"""Batches in OpenAI's format: ``loramux run-batch``."""
