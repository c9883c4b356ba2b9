"""The OpenAI HTTP door."""
