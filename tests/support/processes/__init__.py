"""Processes of tests: services, commands and gateways, and their forks."""
