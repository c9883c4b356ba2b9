"""Products with weights of 8 and 4 bits, which are widened in registers; of many rows, once in memory.

This package needs torch alone; Triton is imported at the first launch.
"""

from inference_service.engine.kernels.rounded.launch import (
    MOST_ROWS,
    PackedWeight,
    packed_halves,
    product,
    round_rows,
    rounded_beside,
)

__all__ = ["MOST_ROWS", "PackedWeight", "packed_halves", "product", "round_rows", "rounded_beside"]
