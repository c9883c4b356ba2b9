"""Adapters on their way from the store to packed memory, and the deployment that names them."""
