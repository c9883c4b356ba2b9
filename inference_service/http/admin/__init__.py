"""What operators and trainers ask: adapters, rollbacks, pauses, tokens, the load."""
