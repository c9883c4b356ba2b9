"""Object stores, archives behind https and registries as sources of adapters and bases; S3 as a store."""
