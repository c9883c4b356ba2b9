"""Compiled operations for CPUs: what plain torch does with many small operations, in one each.

They are compiled from ``ops.cpp`` and its headers: for a wheel, for every kind of processor, or at the first
start. Where neither could be, or with ``LORAMUX_NATIVE=false``, torch operations do the same.
"""
