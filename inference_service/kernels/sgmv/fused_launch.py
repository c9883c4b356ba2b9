"""From the two launches of a fused linear to the one that does both."""

from __future__ import annotations

import torch

from inference_service.kernels.launch import Launch
from inference_service.kernels.sgmv.layout import COUNTER_STRIDE, Segments, Slices
from inference_service.kernels.sgmv.tuning import FUSED_PER_MULTIPROCESSOR, FusedConfig

_OF_CONFIG = {"BLOCK_T", "BLOCK_R", "BLOCK_N", "num_warps", "num_stages"}


def resident_programs(device: torch.device) -> int:
    """Programs that the device runs together; the interpreter runs one after the other.

    A program that is not resident cannot do what a resident one waits for: a larger grid may never end.
    """
    if device.type != "cuda":
        return 1
    return FUSED_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def fuse(
    shrink: Launch, expand: Launch, config: FusedConfig, segments: Segments, slices: Slices, resident: int
) -> Launch:
    """The launch that does what a shrink with ``config.shrink`` and the expand of the first pass do.

    Both launches are checked by who made them; of expand, the tiles are those of ``config.expand`` instead.
    """
    from inference_service.kernels.sgmv import fused_kernel  # needs Triton

    most = max(shrink.grid[0], config.expand.programs(slices, segments.capacity.segments_per_pass))
    arguments = {k: v for k, v in expand.arguments.items() if k not in _OF_CONFIG} | shrink.arguments
    return Launch(
        fused_kernel.fused_kernel,
        (min(resident, most),),
        arguments
        | {
            "p_counters": segments.counters,
            "COUNTER_STRIDE": COUNTER_STRIDE,
            "BLOCK_N": config.expand.block_n,
            # The driver refuses a grid that cannot be resident: better than a launch that never ends.
            "launch_cooperative_grid": True,
        },
    )
