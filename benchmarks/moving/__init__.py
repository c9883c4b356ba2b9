"""Adapters that come and go, measured: one file per section of ``benchmarks/residency.py``."""
