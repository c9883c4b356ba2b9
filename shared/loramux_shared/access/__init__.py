"""Access control: API keys with scopes, TLS, and the rule about addresses beyond this machine."""

from typing import Final

API_KEY: Final = "LORAMUX_API_KEY"
"""Variable with the key that clients show."""
