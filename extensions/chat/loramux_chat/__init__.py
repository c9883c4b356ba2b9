"""The extension `chat`: conversations in a terminal."""
