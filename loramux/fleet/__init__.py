"""Clients of several replicas: which one is asked, and another where it does not answer."""
