"""Steps without a graph, written down once and repeated without the code that planned them.

A trace has the operations and launches of a step in their order. It holds tensors from before as they are, and
numbers those that the work makes: each replay makes them again, and gives them back behind their last use. A
compiled kernel is launched by position, so that Triton looks nothing up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias
from weakref import ref

import torch
from torch import Tensor

from inference_service.engine.tape import UNINITIALIZED, Watching, tensors_of
from inference_service.kernels.launch import Launch, SideStream, intercepted, taker

Made: TypeAlias = list[Any]
"""Tensors that a replay has made, by their numbers; None before the first use and behind the last."""


class Trace:
    """Work that can be repeated over the same static tensors."""

    def __init__(self, steps: Sequence[tuple[Callable[[Made], None], tuple[int, ...]]], made: int) -> None:
        """Take the steps, each with the tensors that it is the last to use, and how many tensors are made."""
        self._steps = steps
        self._made = made

    @torch.inference_mode()
    def replay(self) -> None:
        """Do it again."""
        made: Made = [None] * self._made
        for step, last in self._steps:
            step(made)
            for number in last:
                made[number] = None


class TraceRecorder:
    """Records traces: the recording does the work."""

    @torch.inference_mode()
    def capture(self, work: Callable[[], None]) -> Trace:
        """Do the work, and return its trace.

        Raises:
            CaptureRefused: the work depends on values, or takes some from the host.
        """
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
        self.steps: list[Callable[[Made], None]] = []
        self.used: list[list[int]] = []
        """Numbers of the tensors that each step makes or reads."""
        self.made = 0
        self._numbers: dict[int, tuple[ref[Tensor], int]] = {}
        """Numbers of tensors by their identity; that of one that is gone may come again."""
        self._enqueue = enqueue
        self._beside: list[int] = []
        """Numbers of the tensors that launches on another stream use, until that is waited for."""

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor]) -> Any:
        """Do it, and keep what repeats it with new tensors."""
        bind, known = self._bind([*args, *kwargs.values()])
        out = func(*args, **kwargs)
        if func.is_view and not known:
            return out  # of a tensor from before: as lasting as that
        results: list[tuple[int, int]] = []
        for place, result in enumerate(tensors_of(out)):
            if not any(result is each for each in inputs):
                self._numbers[id(result)] = ref(result), self.made
                results.append((place, self.made))
                self.made += 1
        if func._schema.name.removeprefix("aten::") in UNINITIALIZED and out.is_contiguous():
            step = _allocation(out, self.made - 1)
        else:
            one = isinstance(out, Tensor)
            step = _operation(func, bind, tuple(kwargs), results, one=one)
        self._add(step, [*known, *(number for _, number in results)])
        return out

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
            run = compiled[(*launch.grid, 1, 1)[:3]]
            bind, known = self._bind(launch.positional())
            if side is None:
                self._add(lambda made: run(*bind(made)), known)
            else:
                self._add(lambda _: side.fork(), [])
                self._add(lambda made: run(*bind(made), stream=side.handle), known)
        self._beside += known if side is not None else []

    def join(self, side: SideStream) -> None:
        """Wait for what was launched beside; until then no tensor of it is given back."""
        side.wait()
        self._add(lambda _: side.wait(), self._beside)
        self._beside = []

    def _add(self, step: Callable[[Made], None], used: list[int]) -> None:
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


def _allocation(like: Tensor, number: int) -> Callable[[Made], None]:
    """Return what makes a tensor of this shape, by the shortest way."""
    make = partial(torch.empty, like.shape, dtype=like.dtype, device=like.device)

    def step(made: Made) -> None:
        made[number] = make()

    return step


def _operation(
    func: Any,
    bind: Callable[[Made], list[Any]],
    names: tuple[str, ...],
    results: list[tuple[int, int]],
    *,
    one: bool,
) -> Callable[[Made], None]:
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
