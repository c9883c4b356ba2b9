"""What layers keep of a sequence, and how the memory of a cache is divided among them."""

from __future__ import annotations


def window_blocks(window: int, rows: int, block_size: int) -> int:
    """Blocks that a sequence holds at most of a layer with a window, in a step that computes so many rows of
    it.

    What the first row sees, the rows, a block at each end that is not whole, and one more: a block is given
    back when the next one is full.
    """
    return (window + rows - 3) // block_size + 3
