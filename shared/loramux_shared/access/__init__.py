"""Access control: API keys with scopes, TLS, and the rule about addresses beyond this machine."""
