"""MXFP4, of gpt-oss."""

from typing import Final

from loramux_shared.bases.weight_format import Quantization, WeightFormat, WeightScheme

COLUMNS: Final = 32
"""Columns that share a scale."""
EXPERTS: Final = Quantization("mxfp4", (WeightScheme("mxfp4", 1, COLUMNS),))
MXFP4: Final = WeightFormat("mxfp4", ("mxfp4",), "experts in 3-D, as gpt-oss has them", lambda _: EXPERTS)
