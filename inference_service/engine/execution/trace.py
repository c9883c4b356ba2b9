"""Steps without a graph, written down once and repeated without the code that planned them.

A trace has the operations and launches of a step in their order. It holds tensors from before as they are, and
numbers those that the work makes: each replay makes them again, and gives them back behind their last use.
Compiled kernels are launched as Triton launches them when it has looked everything up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeAlias
from weakref import ref

import torch
from torch import Tensor

from inference_service.engine.execution.tape import UNINITIALIZED, Watching, tensors_of
from inference_service.engine.kernels.launch import Launch, SideStream, current_stream, intercepted, taker

Made: TypeAlias = list[Any]
"""Tensors that a replay has made, by their numbers; None before the first use and behind the last.

The first is CUDA's handle of the current stream.
"""
Step: TypeAlias = Callable[[Made], None]
STREAM: Final = 0
CURRENT: Final = object()
"""Stands for that handle among the arguments of a launch."""
SHORTER: Final[dict[Any, Callable[..., Tensor]]] = {
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.addmm.default: torch.addmm,
    torch.ops.aten.view.default: Tensor.view,
}
"""Functions that do what operations do, and that are called faster."""
REUSED_BYTES: Final = 1 << 20
"""Most bytes of a tensor that is not given back where a later one of the same kind takes its place."""


class Trace:
    """Work that can be repeated over the same static tensors."""

    def __init__(self, steps: Sequence[tuple[Step, tuple[int, ...]]], made: int) -> None:
        """Take the steps, each with the tensors that it is the last to use, and how many tensors are made."""
        self._steps = steps
        self._made = made

    @torch.inference_mode()
    def replay(self) -> None:
        """Do it again."""
        made: Made = [None] * self._made
        made[STREAM] = current_stream()
        for step, last in self._steps:
            step(made)
            for number in last:
                made[number] = None


class TraceRecorder:
    """Records traces: the recording does the work."""

    @torch.inference_mode()
    def capture(self, work: Callable[[], None]) -> Trace:
        """Do the work, and return its trace; raise CaptureRefused where it depends on values of the host."""
        tracing = _Tracing(taker())
        with tracing, intercepted(tracing.launch, tracing.join):
            work()
        last = {number: place for place, used in enumerate(tracing.used) for number in used}
        ends: list[list[int]] = [[] for _ in tracing.steps]
        for number, place in last.items():
            ends[place].append(number)
        return Trace(list(zip(tracing.steps, map(tuple, ends), strict=True)), tracing.made)


class _Tracing(Watching):  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    """Notes what is done for a trace."""

    def __init__(self, enqueue: Callable[[Launch], Any]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.used: list[list[int]] = []
        """Numbers of the tensors that each step makes or reads."""
        self.made = STREAM + 1
        self._numbers: dict[int, tuple[ref[Tensor], int]] = {}
        """Numbers of tensors by their identity; that of one that is gone may come again."""
        self._enqueue = enqueue
        self._small: dict[Any, list[tuple[ref[Tensor], int]]] = {}
        """Small tensors that were allocated, by their shapes, types and devices."""
        self._read: set[int] = set()
        """Numbers of tensors that operations use, which may be views of them."""
        self._beside: list[int] = []
        """Numbers of the tensors that launches on another stream use, until that is waited for."""
        self._forked = False
        """Whether that waits for all that the current stream was given."""

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor]) -> Any:
        """Do it, and keep what repeats it with new tensors."""
        bind, known = self._bind([*args, *kwargs.values()])
        out = func(*args, **kwargs)
        if func.is_view and not known:
            return out  # of a tensor from before: as lasting as that
        if func._schema.name.removeprefix("aten::") in UNINITIALIZED and out.is_contiguous():
            self._allocate(out)
            return out
        self._read.update(known)
        self._forked = False
        results = [
            (place, self._new(result))
            for place, result in enumerate(tensors_of(out))
            if not any(result is each for each in inputs)
        ]
        one = isinstance(out, Tensor)
        if one and results and not kwargs:
            step = _function(SHORTER.get(func, func), bind, results[0][1])
        else:
            step = _operation(func, bind, tuple(kwargs), results, one=one)
        self._add(step, [*known, *(number for _, number in results)])
        return out

    def _new(self, tensor: Tensor) -> int:
        number = self.made
        self._numbers[id(tensor)] = ref(tensor), number
        self.made += 1
        return number

    def _allocate(self, like: Tensor) -> None:
        """Make room for a tensor, or let it take the place of one that nothing uses any more."""
        kind, small = (like.shape, like.dtype, like.device), like.nbytes <= REUSED_BYTES
        places = self._small.setdefault(kind, []) if small else []
        for place, (known, number) in enumerate(places):
            if known() is None and number not in self._read and number not in self._beside:
                places[place] = self._numbers[id(like)] = ref(like), number
                return
        number = self._new(like)
        places.append((ref(like), number))
        self._add(_allocation(like, number), [number])

    def launch(self, launch: Launch) -> None:
        """Take a kernel launch; what the interpreter does within it is not recorded."""
        compiled, side = self.unseen(lambda: self._enqueue(launch)), launch.beside
        if compiled is None:
            names, kernel, grid = tuple(launch.arguments), launch.kernel, launch.grid
            bind, known = self._bind(list(launch.arguments.values()))
            self._add(
                lambda made: Launch(kernel, grid, dict(zip(names, bind(made), strict=True)), side)(), known
            )
        else:
            if side is not None and not self._forked:
                self._add(lambda _: side.fork(), [])
            grid, stream = (*launch.grid, 1, 1)[:3], CURRENT if side is None else side.handle
            none = None, None, None  # neither hooks nor what they would be called with
            first = *grid, stream, compiled.function, compiled.packed_metadata, *none
            run, (bind, known) = compiled.run, self._bind([*first, *launch.positional()])
            self._add(lambda made: run(*bind(made)), known)
        self._forked = side is not None
        self._beside += known if side is not None else []

    def join(self, side: SideStream) -> None:
        """Wait for what was launched beside; until then no tensor of it is given back."""
        side.wait()
        self._add(lambda _: side.wait(), self._beside)
        self._beside, self._forked = [], False

    def _add(self, step: Step, used: list[int]) -> None:
        self.steps.append(step)
        self.used.append(used)

    def _number(self, tensor: Tensor) -> int | None:
        known, number = self._numbers.get(id(tensor), (None, 0))
        return number if known is not None and known() is tensor else None

    def _bind(self, held: list[Any]) -> tuple[Callable[[Made], list[Any]], list[int]]:
        """Return what gives these arguments for a replay, and the numbers among them."""
        holes: list[tuple[int, int]] = []
        nested: list[tuple[int, Callable[[Made], list[Any]]]] = []
        fixed, used = held.copy(), []
        for place, each in enumerate(held):
            if isinstance(each, Tensor):
                if (number := self._number(each)) is not None:
                    holes.append((place, number))
                    used.append(number)
                    fixed[place] = None
            elif each is CURRENT:
                holes.append((place, STREAM))
            elif isinstance(each, list | tuple) and tensors_of(each):
                inner, more = self._bind(list(each))
                nested.append((place, inner))
                used += more
                fixed[place] = None

        def bind(made: Made) -> list[Any]:
            arguments = fixed.copy()
            for place, number in holes:
                arguments[place] = made[number]
            for place, inner in nested:
                arguments[place] = inner(made)
            return arguments

        return bind, used


def _allocation(like: Tensor, number: int) -> Step:
    """Return what makes a contiguous tensor of this shape, by the shortest way."""
    make = partial(torch.empty_strided, tuple(like.shape), like.stride(), dtype=like.dtype, device=like.device)

    def step(made: Made) -> None:
        made[number] = make()

    return step


def _function(func: Callable[..., Tensor], bind: Callable[[Made], list[Any]], number: int) -> Step:
    """Return what makes a tensor of arguments that have no names."""

    def step(made: Made) -> None:
        made[number] = func(*bind(made))

    return step


def _operation(
    func: Any,
    bind: Callable[[Made], list[Any]],
    names: tuple[str, ...],
    results: list[tuple[int, int]],
    *,
    one: bool,
) -> Step:
    """Return what repeats an operation of torch, whose last arguments have names."""

    def step(made: Made) -> None:
        arguments = bind(made)
        if names:
            split = len(arguments) - len(names)
            out = func(*arguments[:split], **dict(zip(names, arguments[split:], strict=True)))
        else:
            out = func(*arguments)
        if not one:
            for each in out if isinstance(out, tuple) else ():
                if isinstance(each, torch.ScriptObject):
                    each.wait()  # type: ignore[attr-defined]  # an exchange of ranks: torch waits for it
        if results:
            every = (out,) if one else tensors_of(out)
            for place, number in results:
                made[number] = every[place]

    return step
