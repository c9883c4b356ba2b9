"""Compiled operations for CPUs: what plain torch does with many small operations, in one each.

They are compiled from ``ops.cpp`` and its headers at the first start, in a few seconds, where a C++ compiler is
found; without one, or with ``LORAMUX_NATIVE=false``, torch operations do the same.
"""
