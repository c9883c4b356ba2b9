"""Many replicas: where requests go, and what that costs (see `benchmarks.fleet.__main__`)."""
