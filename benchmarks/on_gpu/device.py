"""The measured device: a GPU with its clock, or in a rehearsal the interpreter, which has none."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch

from inference_service.engine.graphs import CudaRecorder, Recorder
from inference_service.engine.tape import TapeRecorder

FLUSH: Final = 4
"""Bytes that are read between two measurements, as a multiple of the L2 cache."""


class Rehearsal:
    """Triton's interpreter on the CPU, with tiny sizes; tapes stand in for graphs, and are as strict."""

    where = torch.device("cpu")
    dtype = torch.float32
    rehearses = True

    def recorder(self) -> Recorder:
        """Return what records graphs here."""
        return TapeRecorder()

    def flush(self) -> None:
        """Leave nothing in the cache that the next work reads."""

    def mark(self) -> Any:
        """Note when the device gets here."""

    def between_us(self, _begin: Any, _end: Any) -> float:
        """Microseconds from one mark to the other, once `wait` has returned; NaN where there is no clock."""
        return math.nan

    def wait(self) -> None:
        """Return when the device has done everything."""

    def now_s(self) -> float:
        """Return the host's clock; NaN in a rehearsal."""
        return math.nan


class Gpu(Rehearsal):
    """The current CUDA device."""

    dtype = torch.bfloat16
    rehearses = False

    def __init__(self) -> None:
        self.where = torch.device("cuda", torch.cuda.current_device())

    @cached_property
    def _cold(self) -> torch.Tensor:
        size = FLUSH * torch.cuda.get_device_properties(self.where).L2_cache_size
        return torch.zeros(max(size, 2**26) // 4, dtype=torch.int32, device=self.where)

    def recorder(self) -> Recorder:
        """CUDA's graphs."""
        return CudaRecorder(self.where)

    def flush(self) -> None:
        """Read something else: what is read leaves nothing behind that has to be written back."""
        self._cold.max()

    def mark(self) -> Any:
        """Record an event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        event.record()
        return event

    def between_us(self, begin: Any, end: Any) -> float:
        """Events have a resolution of about half a microsecond."""
        return float(begin.elapsed_time(end)) * 1e3

    def wait(self) -> None:
        """Wait for all streams."""
        torch.cuda.synchronize()

    def now_s(self) -> float:
        """Return the monotonic clock."""
        return time.perf_counter()


Device = Rehearsal
"""What a device does; those of a rehearsal do it without a clock."""


@dataclass(frozen=True)
class Machine:
    """The facts about the card before anything runs."""

    device: Device
    copy_gb_s: float
    """Bytes read and written by a copy of a large tensor, per second: what floors are computed with."""

    def floor_us(self, num_bytes: int) -> float:
        """Microseconds in which so many bytes can be moved."""
        return num_bytes / self.copy_gb_s / 1e3
