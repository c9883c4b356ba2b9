"""The ranks that compute a decoder together, each in a process of its own: what they exchange in a step."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from loramux_shared.bases.shard import Shard

INTERFACE: Final = "GLOO_SOCKET_IFNAME"
LOOPBACK: Final = "lo0" if sys.platform == "darwin" else "lo"


class Group:
    """A rank's end of the group: gloo on CPUs, NCCL on GPUs."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def meet(self, meeting: Path, device: torch.device, timeout_s: float) -> None:
        """Meet the other ranks by a file that all of them see; no exchange may last longer than timeout_s.

        Raises:
            RuntimeError: a rank did not come.
        """
        shard = self.shard
        chosen = INTERFACE in os.environ
        os.environ.setdefault(INTERFACE, LOOPBACK)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=meeting.as_uri(),
            rank=shard.rank,
            world_size=shard.world,
            timeout=timedelta(seconds=timeout_s),
        )
        if not chosen:
            del os.environ[INTERFACE]

    def share(self, rows: Tensor) -> None:
        """Give all ranks the rows [T, hidden] of the first one."""
        dist.broadcast(rows, src=0)

    def sum(self, partial: Tensor) -> Tensor:
        """Sum what each rank computed, in place; all have the same bits then."""
        dist.all_reduce(partial)
        return partial

    def close(self) -> None:
        """Leave the group, be the others there or not."""
        dist.destroy_process_group()
