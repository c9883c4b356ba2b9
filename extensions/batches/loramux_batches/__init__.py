"""Batches in OpenAI's format: files and batches of a replica, and ``loramux run-batch``."""
