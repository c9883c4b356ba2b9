"""The engine's asynchronous face: text in, events out."""
