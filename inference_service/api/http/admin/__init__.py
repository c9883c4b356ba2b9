"""Routes for operators and trainers: adapters, rollbacks, pauses, tokens, the load."""
