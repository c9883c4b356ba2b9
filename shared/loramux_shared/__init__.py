"""What both services stand on: faults, settings, deployments, bundles, stores, sources, the RPC shell."""
