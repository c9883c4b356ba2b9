"""A museum of hostile, broken and odd adapters; every exhibit is made by a script when a test asks for it."""
