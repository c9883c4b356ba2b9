"""OpenAI's API: chats, completions and models."""
