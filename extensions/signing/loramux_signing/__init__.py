"""OpenSSF model signing of folders and of deployments in a store."""
