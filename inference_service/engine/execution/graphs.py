"""Graphs: work that was recorded once, and is repeated over the same memory with one call.

A graph freezes all but the contents of memory: operations, shapes, addresses, grids, Python numbers. What is
new at a replay must be in static tensors that were there before the recording.
`tape.TapeRecorder` stands in for CUDA where there is none.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from inference_service.engine.kernels.launch import stream_of

WARM_UPS = 2
"""Runs before the recording: they compile kernels, choose algorithms, and allocate what is kept."""


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Do it again, with what the static tensors hold now; only static tensors hold the result."""
        ...


class Recorder(Protocol):
    """Records work; what graphs of one recorder need for themselves, they share."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what a function does. It is called several times, and must do the same each time."""
        ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory, so that only one of them may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = stream_of("recording", device)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record on a stream of its own: what others do on theirs meanwhile does not get in.

        Nor does it end the capture: other threads may pin memory, which CUDA refuses to all threads by default.
        """
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                work()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        current.wait_stream(self._stream)
        return graph
