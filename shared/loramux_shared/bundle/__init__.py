"""Bundles: an adapter as two numpy files and a manifest, addressed by the manifest's digest."""
