"""The services as deployments of a Ray cluster; nothing else of this repository needs Ray."""
