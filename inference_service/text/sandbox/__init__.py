"""Untrusted work, in processes of their own, which bound themselves."""
