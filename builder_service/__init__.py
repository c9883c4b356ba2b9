"""The builder service: adapter repositories in, bundles out."""
