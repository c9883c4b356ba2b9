"""Graphs on a CPU: the stand-in for CUDA graphs, as strict as they are.

A tape holds every operation and every kernel launch with its arguments and results, and runs them again over
the same memory. It refuses at the recording what CUDA refuses, and what CUDA would silently freeze; only copies
to the host, which are none here, it does not see.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from inference_service.engine.kernels.launch import Launch, intercepted

T = TypeVar("T")
REFUSED_TAGS: Final = {
    torch.Tag.data_dependent_output: "reads a value on the host",
    torch.Tag.dynamic_output_shape: "makes a shape of values",
    torch.Tag.nondeterministic_seeded: "draws from a generator of the host",
}
REFUSED: Final = {
    "is_nonzero": "reads a value on the host",
    "resolve_neg": "reads values on the host",
    "lift_fresh": "takes values from Python",
    "scalar_tensor": "takes a value from Python",
    "arange": "takes values from Python",
    "repeat_interleave": "makes a shape of values",
}
"""Reasons by the operation's name."""
INDEXING: Final = ("index", "index_put", "index_put_")
"""Static unless a mask is among the indices."""
UNINITIALIZED: Final = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class CaptureRefused(RuntimeError):
    """Work that a graph cannot repeat."""


@dataclass(frozen=True)
class _Operation:
    """One operation; replayed, its new results take the place of those in memory."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[tuple[int, Tensor], ...]
    """Those with memory of their own, with their places among all results."""

    def replay(self) -> None:
        """Run it again."""
        again = tensors_of(self.function(*self.args, **self.kwargs))
        for place, result in self.results:
            result.copy_(again[place])


class Watching(TorchDispatchMode, ABC):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Sees every operation while it is active, but for those within a kernel of the interpreter."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._in_kernel = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: to skip its compiler, torch would import it, in a second of the engine's thread."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._in_kernel:
            return func(*args, **kwargs)
        inputs = tensors_of((args, kwargs))
        refuse(func, inputs)
        with self:
            parts = func.decompose(*args, **kwargs)
        return self.record(func, args, kwargs, inputs) if parts is NotImplemented else parts

    @abstractmethod
    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor]) -> Any:
        """Do an operation that has no parts, with these tensors among its arguments, and note it."""

    def unseen(self, launch: Callable[[], T]) -> T:
        """Launch a kernel, and see nothing of what the interpreter does within it."""
        self._in_kernel = True
        try:
            return launch()
        finally:
            self._in_kernel = False


class _Recording(Watching):  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    """Notes what is done for a tape."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []
        self.launched: list[Launch | str] = []
        """Kernels, and operations of torch by their names."""
        self.made: list[Tensor] = []
        """Tensors with memory of their own, made by the work."""
        self.given: dict[int, Tensor] = {}
        """Tensors from before, by their memory."""
        self._known: set[int] = set()
        self._kept: list[Any] = []

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor]) -> Any:
        """Do it, and keep what repeats it over the same memory."""
        self._note(inputs)
        out = func(*args, **kwargs)
        results = tuple((at, t) for at, t in enumerate(tensors_of(out)) if _memory(t) not in self._known)
        self._keep(out, [result for _, result in results])
        writes = any(arg.alias_info is not None and arg.alias_info.is_write for arg in func._schema.arguments)
        if writes or (results and func._schema.name.removeprefix("aten::") not in UNINITIALIZED):
            self.steps.append(_Operation(func, args, kwargs, results).replay)
            self.launched.append(func._schema.name)
        return out

    def launch(self, launch: Launch) -> None:
        """Take a kernel launch, which replays alone do: a graph's recording runs nothing either."""
        self._note(tensors_of(launch.arguments))
        self.steps.append(launch.enqueue)
        self.launched.append(launch)

    def _note(self, inputs: Iterable[Tensor]) -> None:
        for tensor in inputs:
            if _memory(tensor) not in self._known:
                self.given[_memory(tensor)] = tensor
                self._known.add(_memory(tensor))

    def _keep(self, out: Any, made: list[Tensor]) -> None:
        self._kept.append(out)
        self.made += made
        self._known |= {_memory(tensor) for tensor in made}


class Tape:
    """A recording that can be replayed."""

    def __init__(self, recording: _Recording, pool: list[Tensor]) -> None:
        self._steps = recording.steps
        self._pool = pool
        pool += recording.made

    @torch.inference_mode()
    def replay(self) -> None:
        """Spoil what all graphs of the recorder left in memory of their own, then repeat every step."""
        for tensor in self._pool:
            _poison(tensor)
        for step in self._steps:
            step()


class TapeRecorder:
    """Records tapes.

    What one leaves behind in memory of its own is poisoned before each replay of any of them: NaN and numbers
    that are no index.
    """

    def __init__(self) -> None:
        self._pool: list[Tensor] = []

    @torch.inference_mode()
    def capture(self, work: Callable[[], None]) -> Tape:
        """Record what a function does, twice: a tensor that is there only once does not outlive the recording.

        Before that it runs once unseen, so that what is made at first use is there. Raise CaptureRefused for
        work that depends on values, or takes some from the host.
        """
        work()
        first, recording = _Recording(), _Recording()
        for each in (first, recording):
            with each, intercepted(each.launch):
                work()
        passing = [tensor for memory, tensor in recording.given.items() if memory not in first.given]
        if passing:
            shapes = [tuple(tensor.shape) for tensor in passing]
            raise CaptureRefused(f"the work reads tensors that do not outlive it, of shapes {shapes}")
        return Tape(recording, self._pool)


@torch.inference_mode()
def launches_of(work: Callable[[], None]) -> list[Launch | str]:
    """Return what a function launches: kernels, which do not run, and operations of torch by their names.

    Tensors may be of torch's device "meta", which has shapes and no memory.
    """
    recording = _Recording()
    with recording, intercepted(recording.launched.append):
        work()
    return recording.launched


def names_of(launched: Iterable[Launch | str]) -> tuple[str, ...]:
    """Return the names of kernels and of operations of torch."""
    return tuple(each if isinstance(each, str) else each.kernel.fn.__name__ for each in launched)


def tensors_of(tree: object) -> list[Tensor]:
    """Return the tensors within arguments or results."""
    if isinstance(tree, Tensor):
        return [tree]
    found: list[Tensor] = []
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ():
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, list | tuple | dict):
            found += tensors_of(part)
    return found


def _memory(tensor: Tensor) -> int:
    """Identify a tensor's memory; views share it."""
    if tensor.is_mkldnn:
        return id(tensor)
    storage = tensor.untyped_storage()
    return int(storage._cdata) if tensor.is_meta else storage.data_ptr()


def refuse(function: Any, inputs: Sequence[Tensor]) -> None:
    """Raise `CaptureRefused` for an operation that cannot be repeated as it is."""
    name = function._schema.name.removeprefix("aten::")
    reasons = [REFUSED[name]] if name in REFUSED else []
    if name in INDEXING:
        if any(tensor.dtype in (torch.bool, torch.uint8) for tensor in inputs[1:]):
            reasons.append("makes a shape of values")
    else:
        reasons += [reason for tag, reason in REFUSED_TAGS.items() if tag in function.tags]
    if reasons:
        raise CaptureRefused(f"{name} {reasons[0]}")


def _poison(tensor: Tensor) -> None:
    if tensor.dtype.is_floating_point:
        tensor.fill_(torch.nan)
    elif tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).min)
