"""The stand-in for CUDA graphs: it replays, refuses and freezes the same operations."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, call, patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from inference_service.engine.backends.replayed import _Others
from inference_service.engine.execution import graphs, trace
from inference_service.engine.execution.graphs import Recorder
from inference_service.engine.execution.tape import CaptureRefused, TapeRecorder, Watching
from inference_service.engine.execution.trace import TraceRecorder
from inference_service.engine.kernels.launch import Launch, SideStream, stream_of

STATIC = torch.zeros(4, 6)
INDEX = torch.tensor([2, 0])
MASK = torch.tensor([True, False, True, False])


@pytest.fixture(params=[TapeRecorder, TraceRecorder])
def recorder(request: pytest.FixtureRequest) -> Recorder:
    return request.param()


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "item": (lambda: STATIC.sum().item(), "item reads a value"),
    "bool": (lambda: bool(STATIC.sum() > 0), "is_nonzero reads a value"),
    "tolist": (lambda: INDEX.tolist(), "reads values on the host"),
    "numpy": (lambda: STATIC.numpy(), "reads values on the host"),
    "nonzero": (lambda: MASK.nonzero(), "nonzero makes a shape of values"),
    "mask": (lambda: STATIC[MASK], "index makes a shape of values"),
    "masked write": (lambda: STATIC.clone().__setitem__(MASK, STATIC[0]), "index_put_ makes a shape of values"),
    "repeat": (lambda: INDEX.repeat_interleave(INDEX), "makes a shape of values"),
    "tensor": (lambda: torch.tensor([1, 2]), "takes values from Python"),
    "numpy array": (lambda: torch.from_numpy(np.zeros(3)), "takes values from Python"),
    "arange": (lambda: torch.arange(4), "arange takes values"),
    "random": (lambda: torch.rand(3), "draws from a generator"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_depends_on_the_host_is_refused(recorder: Recorder, name: str) -> None:
    """Synchronisation, shapes made of values, values from Python and draws of the host end the recording."""
    work, message = REFUSED[name]
    with pytest.raises(CaptureRefused, match=message):
        recorder.capture(work)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [Watching, _Others])
def test_watching_operations_imports_no_compiler(mode: Any) -> None:
    """Torch wraps what watches operations, unless told not to, and imports its compiler at the first one."""
    assert inspect.unwrap(mode.__torch_dispatch__) is mode.__torch_dispatch__


def test_tensors_that_do_not_outlive_the_recording_are_refused() -> None:
    """A recording that reads a tensor of a passing life is refused with its shape."""
    passing, out = iter([torch.ones(3), torch.ones(3), torch.ones(3)]), torch.zeros(3)

    def work() -> None:
        out.copy_(next(passing))

    with pytest.raises(CaptureRefused, match=r"do not outlive it, of shapes \[\(3,\)\]"):
        TapeRecorder().capture(work)


class Kernel:
    """A compiled kernel, which doubles; Triton launches it by keyword, a trace as Triton does behind that."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.signature = inspect.signature(lambda p_x, p_out, FACTOR=2: None)  # noqa: ARG005 - names alone count
        self.calls: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []
        self.seen: list[weakref.ref[Tensor]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Kernel]:

        def launch(*args: Any, **arguments: Any) -> Kernel:
            self.calls.append((grid, args))
            x, out, factor = args or (arguments["p_x"], arguments["p_out"], 2)
            torch.mul(x, factor, out=out)
            self.seen = [weakref.ref(x), weakref.ref(out)]
            return self

        return launch

    def run(self, x: int, y: int, z: int, stream: int | None, *rest: Any) -> None:
        """Launch it on a stream."""
        assert rest[:5] == (self.function, self.packed_metadata, None, None, None)
        self.stream = stream
        self[x, y, z](*rest[5:])


def test_a_trace_launches_by_position_and_holds_no_tensor_of_its_work() -> None:
    """A trace replays its launches with positional arguments, and keeps no tensor alive."""
    x, total, kernel = torch.ones(3), torch.zeros(3), Kernel()

    def work() -> None:
        doubled = x.new_empty(3)
        Launch(kernel, (5,), {"p_x": x + 1, "p_out": doubled})()
        total.add_(doubled)

    trace = TraceRecorder().capture(work)
    assert kernel.calls == [((5,), ())]
    for count in (2, 3):
        trace.replay()
        assert torch.equal(total, torch.full((3,), 4.0 * count))
        assert [(grid, args[2]) for grid, args in kernel.calls[1:]] == [((5, 1, 1), 2)]
        del kernel.calls[1:]
        assert [each() for each in kernel.seen] == [None, None]


def test_a_trace_launches_as_triton_does() -> None:
    """Triton's own launch of a compiled kernel gives its launcher the same, and hooks that do nothing."""
    compiler, x = pytest.importorskip("triton.compiler.compiler"), torch.ones(3)
    kernel, stands_in = Kernel(), MagicMock()
    stands_in.launch_metadata.return_value = None
    stands_in.function, stands_in.packed_metadata = kernel.function, kernel.packed_metadata
    compiler.CompiledKernel.__getitem__(stands_in, (5, 1, 1))(x, x, 2, stream=7)
    with patch.object(Kernel, "run") as run, patch.object(trace, "current_stream", lambda: 7):
        TraceRecorder().capture(Launch(kernel, (5,), {"p_x": x, "p_out": x})).replay()
    theirs = list(stands_in.run.call_args.args)
    assert [hook.calls for hook in theirs[7:9]] == [[], []]
    assert [*run.call_args.args] == [*theirs[:7], None, None, *theirs[9:]]


class Beside(SideStream):
    """Another stream, which notes how many launches, and how many living tensors of theirs, each call meets."""

    handle = 7

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.seen = kernel, list[weakref.ref[Tensor]]()
        self.met: list[tuple[int, int]] = []

    def fork(self) -> None:
        self.met.append((len(self.kernel.calls), sum(each() is not None for each in self.seen)))

    def wait(self) -> None:
        self.seen += self.kernel.seen
        launched = len(self.kernel.calls)
        self.kernel.calls.clear()  # which hold them
        self.met.append((launched, sum(each() is not None for each in self.seen)))


def test_a_trace_holds_what_is_used_beside_until_it_waits() -> None:
    """A kernel beside a product reads memory that nothing else may be given before the two come together."""
    x, kernel = torch.ones(3), Kernel()
    side = Beside(kernel)

    def work() -> None:
        for _ in range(2):
            Launch(kernel, (5,), {"p_x": x + 1, "p_out": x + 2}, side)()
            _ = x + 3  # the product
            side.join()

    with patch.object(Beside, "forked", nullcontext):
        trace = TraceRecorder().capture(work)
    for _ in range(2):
        side.met, side.seen = [], []
        trace.replay()
        assert side.met == 2 * [(0, 0), (1, 2)]
    assert kernel.stream == 7


def test_a_small_tensor_takes_the_place_of_one_that_nothing_uses() -> None:
    """Kernels alone have used that, and none beside still does; no other tensor is in its memory."""
    x, total, kernel = torch.ones(3), torch.zeros(3), Kernel()
    side = Beside(Kernel())

    def launched(beside: SideStream | None = None) -> Tensor:
        out = x.new_empty(3)
        Launch(kernel, (5,), {"p_x": x, "p_out": out}, beside)()
        return out

    def work() -> None:
        launched()
        held = launched()  # where the first was, until the end
        launched().view(3)  # elsewhere, for a view may outlive it
        launched(side)  # so this is elsewhere again
        launched()  # and this, while that one may be written
        side.join()
        launched()
        total.add_(held)

    with patch.object(Beside, "forked", nullcontext):
        trace = TraceRecorder().capture(work)
    kernel.calls.clear()
    trace.replay()
    places = [args[1].data_ptr() for _, args in kernel.calls]
    assert [places.index(each) for each in places] == [0, 0, 2, 3, 4, 3]
    assert torch.equal(total, torch.full((3,), 4.0))


def test_a_stream_beside_waits_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch beside comes behind what the current stream has, and before what follows the join."""
    cuda = MagicMock()
    monkeypatch.setattr(torch, "cuda", cuda)
    stream_of.cache_clear()
    side = SideStream(torch.device("cuda"))
    side.launch(Launch(cuda.kernel, (1,), {}))
    side.join()
    stream_of.cache_clear()
    calls = [each for each in cuda.mock_calls if "stream" in each[0] or "kernel" in each[0]]
    beside, current = cuda.Stream.return_value, cuda.current_stream.return_value
    expected = call.Stream().wait_stream(current), call.stream(beside), call.kernel.__getitem__((1,))
    assert [each for each in calls if each in expected] == [*expected]
    assert calls[-1] == call.current_stream().wait_stream(beside)


def test_a_trace_waits_for_exchanges_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay waits for the exchanges that its recording waited for."""
    waited: list[int] = []
    x = torch.ones(3)

    def wait(work: torch.ScriptObject) -> None:
        work._get_method("wait")()
        waited.append(1)

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        trace = TraceRecorder().capture(lambda: dist.all_reduce(x))
        monkeypatch.setattr(torch.ScriptObject, "wait", wait, raising=False)
        trace.replay()
        del trace  # the last to let its group go waits for its threads, with the interpreter's lock
    finally:
        dist.destroy_process_group()
    assert waited == [1]


def test_launches_of_other_threads_are_in_no_trace() -> None:
    """A proof that runs beside a step which is recorded launches for itself."""
    x, own, other = torch.ones(3), Kernel(), Kernel()
    beside = Launch(other, (1,), {"p_x": x, "p_out": torch.zeros(3)})

    def work() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(beside).result()
        Launch(own, (1,), {"p_x": x, "p_out": x.new_empty(3)})()

    TraceRecorder().capture(work).replay()
    assert (len(own.calls), len(other.calls)) == (2, 1)


def test_a_capture_is_not_ended_by_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads may pin memory during a capture; recorders share a stream, and each purpose has one."""
    modes: list[str] = []
    made: list[MagicMock] = []

    def graph(*_: object, capture_error_mode: str, **__: object) -> MagicMock:
        modes.append(capture_error_mode)
        return MagicMock()

    def stream(_device: torch.device) -> MagicMock:
        return made.append(MagicMock()) or made[-1]

    others = {"graph_pool_handle": tuple, "CUDAGraph": object, "stream": lambda stream: stream}
    stands_in = SimpleNamespace(graph=graph, Stream=stream, current_stream=MagicMock, **others)
    monkeypatch.setattr(torch, "cuda", stands_in)
    stream_of.cache_clear()
    device = torch.device("cuda")
    graphs.CudaRecorder(device).capture(lambda: None)
    assert modes == ["thread_local"]
    graphs.CudaRecorder(device)
    assert len(made) == 1  # cuBLAS would keep memory for each
    assert len({id(stream_of(purpose, device)) for purpose in ("copies", "copies", "proofs", "recording")}) == 3
    stream_of.cache_clear()


def test_streams_are_made_in_one_place() -> None:
    """No code of the service makes a stream but `stream_of`: cuBLAS would keep memory for each."""
    sources = Path(graphs.__file__).parents[1].rglob("*.py")
    assert [path.name for path in sources if re.search(r"\bStream\(", path.read_text())] == ["launch.py"]


@pytest.mark.parametrize(("dtype", "spoilt"), [(torch.float32, torch.nan), (torch.int32, -(2**31))])
def test_a_tape_spoils_what_others_left(dtype: torch.dtype, spoilt: float) -> None:
    """Memory of a tape's own holds nothing that another tape could use."""
    recorder, x, out = TapeRecorder(), torch.zeros(2, dtype=dtype), torch.zeros(2, dtype=dtype)
    made: list[Tensor] = []

    def work() -> None:
        made[:] = [x + 1]
        out.copy_(made[0])

    first, second = recorder.capture(work), recorder.capture(lambda: out.mul_(2))
    first.replay()
    second.replay()
    assert out.tolist() == [2, 2]
    torch.testing.assert_close(made[0], torch.full_like(x, spoilt), equal_nan=True)
