"""A kernel launch as a value, and what the launchers of all kernels check.

Triton is imported by the modules of kernels alone, for machines without a GPU need none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any, Final, Literal, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
ARCHITECTURES: Final = (80, 90, 100, 120)
"""The architectures that every configuration of every tuning table is compiled for in the tests."""
DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments: what a CUDA graph freezes at capture."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    beside: SideStream | None = None
    """Stream on which it runs, so that what the current stream is given next does not wait for it."""

    def positional(self) -> list[Any]:
        """Return the arguments in the kernel's order, as a compiled kernel takes them."""
        parameters = self.kernel.signature.parameters.values()
        return [self.arguments.get(each.name, each.default) for each in parameters]

    def __call__(self) -> None:
        """Enqueue it on the current stream, or give it to who intercepts launches."""
        taker()(self)

    def enqueue(self) -> Any:
        """Enqueue it on its stream; return the compiled kernel, which the interpreter has none of."""
        with nullcontext() if self.beside is None else self.beside.forked():
            return self.kernel[self.grid](**self.arguments)


@dataclass(frozen=True)
class RowTile:
    """A tile of kernels that go through rows: elements, heads or pieces that a program takes at once."""

    block: int
    num_warps: int

    @property
    def arguments(self) -> dict[str, Any]:
        """Return those of a kernel."""
        return {"BLOCK": self.block, "num_warps": self.num_warps}


@cache
def stream_of(
    purpose: Literal["copies", "proofs", "recording", "beside"],  # noqa: ARG001 - a key of the cache
    device: torch.device,
) -> Any:
    """Return the one stream of a purpose on a CUDA device, for the life of the process.

    cuBLAS keeps 32 MiB for each stream that it has computed on.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def current_stream() -> int | None:
    """Return CUDA's own handle of the current stream, as a compiled kernel takes it; None: there is no CUDA."""
    return torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else None


class SideStream:
    """A stream beside the current one, for launches that a later one of that stream waits for.

    In a graph the two become branches. Where there is no CUDA, launches follow one another as they are given.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = stream_of("beside", device) if device.type == "cuda" else None

    @property
    def handle(self) -> int | None:
        """CUDA's own of the stream, as a compiled kernel takes it; None: the current one."""
        return None if self._stream is None else self._stream.cuda_stream

    def fork(self) -> None:
        """Let what comes here wait for what the current stream was given so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    @contextmanager
    def forked(self) -> Iterator[None]:
        """Make it the current stream, behind what that was given so far."""
        self.fork()
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            yield

    def launch(self, launch: Launch) -> None:
        """Launch behind what the current stream was given so far, or hand it to who intercepts launches."""
        replace(launch, beside=self)()

    def join(self) -> None:
        """Let the current stream wait for what was launched here, or hand that to who intercepts launches."""
        _thread.join(self)

    def wait(self) -> None:
        """Let the current stream wait for what was launched here."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


class _Thread(threading.local):
    """Functions that take launches and joins of a thread: proofs launch beside the steps."""

    take: Callable[[Launch], Any] = staticmethod(lambda launch: launch.enqueue())
    join: Callable[[SideStream], None] = staticmethod(SideStream.wait)


_thread = _Thread()


@contextmanager
def intercepted(
    take: Callable[[Launch], Any], join: Callable[[SideStream], None] = SideStream.wait
) -> Iterator[None]:
    """Hand launches of this thread to a function, which enqueues them or does not, and joins to another."""
    before = _thread.take, _thread.join
    _thread.take, _thread.join = take, join
    try:
        yield
    finally:
        _thread.take, _thread.join = before


def planned(launcher: Callable[..., T], *arguments: Any) -> tuple[T, list[Launch]]:
    """Call a launcher; return its result, and what it would have launched."""
    launches: list[Launch] = []
    with intercepted(launches.append):
        return launcher(*arguments), launches


def taker() -> Callable[[Launch], Any]:
    """Return what takes launches of this thread now."""
    return _thread.take


_compiled_for: list[int] = []


@contextmanager
def compiling_for(architecture: int) -> Iterator[None]:
    """Take the tiles of an architecture for tensors on torch's device "meta"."""
    _compiled_for.append(architecture)
    try:
        yield
    finally:
        _compiled_for.pop()


def architecture_of(device: torch.device) -> int:
    """The newest architecture with a tuning table that the device can run; for the interpreter the oldest.
    Raise ValueError for an older device.
    """
    if device.type == "meta" and _compiled_for:
        return _compiled_for[-1]
    if device.type != "cuda":
        return ARCHITECTURES[0]
    major, minor = torch.cuda.get_device_capability(device)
    older = [architecture for architecture in ARCHITECTURES if architecture <= 10 * major + minor]
    if not older:
        raise ValueError(f"kernels need sm_{ARCHITECTURES[0]} or newer, {device} is sm_{major}{minor}")
    return older[-1]


def kernels_of(launcher: str, tensor: Tensor | None = None) -> Any:
    """Return the module of kernels beside a launcher's, imported now: machines without a GPU need no Triton.

    Raises:
        ValueError: they cannot compute with a tensor.
    """
    kernels = import_module(f"{launcher.rpartition('.')[0]}.triton_kernels")
    if tensor is not None:
        require_device(tensor, interpreted=kernels.INTERPRETED)
    return kernels


def interprets() -> bool:
    """Return whether Triton interprets kernels; it must be installed."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def require_device(tensor: Tensor, *, interpreted: bool) -> None:
    """Raise `ValueError` where kernels cannot compute: interpreted ones take tensors of the CPU as well.

    Those of "meta" are for who intercepts launches.
    """
    if tensor.device.type not in ("cuda", "meta") and not interpreted:
        raise ValueError(f"kernels run on CUDA, got a tensor on {tensor.device}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"kernels compute in {DTYPES}, got {tensor.dtype}")


def require(
    tensor: Tensor,
    name: str,
    *,
    dims: int,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise `ValueError` unless a tensor has so many dimensions, the last contiguous, and is what is said."""
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(tensor.shape)}")
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def require_shape(
    tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """The same of a tensor that has this very shape."""
    require(tensor, name, dims=len(shape), dtype=dtype, device=device)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")


class Target:
    """Triton's driver of a GPU that is not here: it compiles, and launches nothing."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, _device: int) -> int:
        """The only one."""
        return 0

    def get_current_target(self) -> Any:
        """Return the architecture, as Triton names it."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._architecture, 32)
