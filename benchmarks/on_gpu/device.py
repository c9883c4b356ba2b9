"""The measured device, and timing on it: a GPU, or in a rehearsal the interpreter, which has no clock."""

import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch

from inference_service.engine.execution.graphs import CudaRecorder, Recorder
from inference_service.engine.execution.tape import TapeRecorder

ROOT: Final = Path(__file__).resolve().parents[2]
FLUSH: Final = 4
"""Bytes that are read between two measurements, as a multiple of the L2 cache."""
REPLAYS: Final = 30
COPIES: Final = 8
"""Most works of one recording: so many times fewer does a measurement contain the start of a graph."""
COPY_BYTES: Final = 2**30
STATE: Final = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,power.limit,driver_version"
"""Fields of ``nvidia-smi --query-gpu``."""
Work = Callable[[], object]


class Device:
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

    def replayed_us(self, works: Sequence[Work]) -> float:
        """Record works of one kind as one graph; return the median microseconds of one, from a cold cache."""

        def together() -> None:
            for work in works:
                work()

        graph, marks = self.recorder().capture(together), []
        for _ in range(1 if self.rehearses else REPLAYS):
            self.flush()
            begin = self.mark()
            graph.replay()
            marks.append((begin, self.mark()))
        self.wait()
        return statistics.median(self.between_us(begin, end) for begin, end in marks) / len(works)

    def copies_of(self, num_bytes: int) -> int:
        """Return how many works to record together, where each takes so many bytes: about 1 GB in all."""
        return 2 if self.rehearses else max(1, min(COPIES, COPY_BYTES // max(1, num_bytes)))

    @cached_property
    def copy_gb_s(self) -> float:
        """Bytes read and written per second by a copy that no cache holds: what floors are computed with."""
        size = 2**12 if self.rehearses else COPY_BYTES
        source, target = (torch.zeros(size, dtype=torch.uint8, device=self.where) for _ in range(2))
        return 2 * size / self.replayed_us([lambda: target.copy_(source)]) / 1e3

    def floor_us(self, num_bytes: int) -> float:
        """Microseconds in which so many bytes can be moved."""
        return num_bytes / self.copy_gb_s / 1e3


class Gpu(Device):
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


def describe(device: Device) -> dict[str, str]:
    """Name the card, its clocks and the versions: without them a number says nothing."""
    about = {
        "card": "none: a rehearsal",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "triton": importlib.metadata.version("triton"),
        "python": platform.python_version(),
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "host": f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}",
    }
    if device.rehearses:
        return about
    card = torch.cuda.get_device_properties(device.where)
    about["card"] = (
        f"{card.name}, sm_{card.major}{card.minor}, {card.multi_processor_count} multiprocessors, "
        f"{card.total_memory / 1e9:.0f} GB, L2 {card.L2_cache_size / 2**20:.0f} MB"
    )
    return about | {"copy": f"{device.copy_gb_s:.0f} GB/s read and written", "before": state()}


def state() -> str:
    """Return what ``nvidia-smi`` says of the cards: clocks, temperature and power."""
    return output_of("nvidia-smi", f"--query-gpu={STATE}", "--format=csv,noheader").replace("\n", "; ")


def output_of(*command: str) -> str:
    """Return what a program prints; why it does not, else."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} does not answer: {error}"
    return done.stdout.strip() or f"{command[0]} does not answer: {done.stderr.strip()}"
