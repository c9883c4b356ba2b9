"""The base of both services: faults, settings, deployments, bundles, stores, sources, the RPC shell."""
