"""Layers of small steps on a CPU: what they did for a step of the same shape is replayed in one call.

The first steps of a shape run operation by operation. Then one is written down (`kernels/cpu/program.py`), if
all its operations are compiled ones. Later steps copy what differs into the arrays that the program reads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from inference_service.engine.backends.base import LayerInputs, LayerOutputs, Layers, Rotation
from inference_service.engine.backends.native_attention import NativeAttention
from inference_service.engine.backends.native_lora import NativeLora
from inference_service.engine.kernels.cpu.ops import CpuOps
from inference_service.engine.kernels.cpu.program import Buffers, Recorder

MOST_ROWS: Final = 64
"""Rows of a step that is replayed; with more, the interpreter's time is less than a hundredth of the step's."""
RUNS_BEFORE: Final = 2
"""Steps of a shape before one is written down: those that are rare, as in a proof, need no program."""
MOST_PROGRAMS: Final = 256
"""Programs of a cache; the one that was used longest ago makes room for another."""
_ADAPTERS_AT: Final = 12
"""The first argument of `linear` that describes adapters, of seven."""

Shape: TypeAlias = tuple[int, int, NativeLora | None, int]
"""Rows, chunks, what adds adapters, and threads."""


class Replays:
    """The programs of a decoder's layers, for each cache."""

    def __init__(self, ops: CpuOps) -> None:
        self._ops = ops
        self._known: WeakKeyDictionary[object, _Known] = WeakKeyDictionary()

    def __call__(self, layers: Layers, inputs: LayerInputs) -> LayerOutputs:
        """Return what layers compute, by their program where there is one."""
        hidden, attention, rotations, lora, cache = inputs
        if (
            len(hidden) > MOST_ROWS
            or not isinstance(attention, NativeAttention)
            or attention.num_chunks is None
            or not (lora is None or isinstance(lora, NativeLora))
        ):
            return layers(hidden, attention, rotations)
        known = self._known.get(cache)
        if known is None:
            known = self._known[cache] = _Known()
        shape = len(hidden), attention.num_chunks, lora, self._ops.threads
        program = known.programs.get(shape)
        if program is not None:
            known.programs.move_to_end(shape)
            return program.run(hidden, attention, rotations)
        if known.is_due(shape):
            with self._ops.recorded(known.buffers, len(hidden)) as recorder:
                if recorder is not None:
                    return known.record(recorder, shape, layers, inputs)
        return layers(hidden, attention, rotations)


class _Known:
    """The programs and the memory of a cache."""

    def __init__(self) -> None:
        self.buffers = Buffers(MOST_ROWS)
        self.programs: OrderedDict[Shape, _Replay] = OrderedDict()
        self._runs: dict[Shape, int] = {}
        self._possible = True

    def is_due(self, shape: Shape) -> bool:
        """Count a step, and return True if it is to be written down."""
        if not self._possible:
            return False
        self._runs[shape] = self._runs.get(shape, 0) + 1
        return self._runs[shape] > RUNS_BEFORE

    def record(self, recorder: Recorder, shape: Shape, layers: Layers, inputs: LayerInputs) -> LayerOutputs:
        """Run layers, and write down what they do."""
        assert isinstance(inputs.attention, NativeAttention)  # noqa: S101 - the caller looked
        hidden, attention = inputs.hidden.clone(), inputs.attention.copied()
        rotations = tuple((cos.clone(), sin.clone()) for cos, sin in inputs.rotations)
        with _Others() as others:
            outputs = layers(hidden, attention, rotations)
        self._possible = not others.ran
        if self._possible:
            self.programs[shape] = _Replay(hidden, attention, rotations, shape[2], recorder, outputs)
            if len(self.programs) > MOST_PROGRAMS:
                oldest, _ = self.programs.popitem(last=False)
                del self._runs[oldest]
        return outputs


class _Replay:
    """A program, and the arrays of what differs from step to step."""

    def __init__(
        self,
        hidden: Tensor,
        attention: NativeAttention,
        rotations: Sequence[Rotation],
        lora: NativeLora | None,
        recorder: Recorder,
        outputs: LayerOutputs,
    ) -> None:
        """Take the inputs and outputs of the step that was written down."""
        self._hidden, self._attention, self._rotations, self._lora = hidden, attention, rotations, lora
        self._program = recorder.program()
        self._outputs = outputs[0], None if outputs[1] is None else recorder.kept(outputs[1])
        self._places = [place for _, place in recorder.linears]
        first = np.array([at + _ADAPTERS_AT for at, _ in recorder.linears], dtype=np.int64)
        self._adapters = first[:, None] + np.arange(7)

    def run(self, hidden: Tensor, attention: NativeAttention, rotations: Sequence[Rotation]) -> LayerOutputs:
        """Return what the layers compute of another step; it is valid until the next one."""
        self._hidden.copy_(hidden)
        for (cos, sin), (new_cos, new_sin) in zip(self._rotations, rotations, strict=True):
            cos.copy_(new_cos)
            sin.copy_(new_sin)
        self._attention.take(attention)
        if self._lora is not None:
            self._program.words[self._adapters] = self._lora.adapters_of_all(self._places)
        self._program.run()
        return self._outputs


class _Others(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Notes whether torch computes anything on this thread: a program could not repeat it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ran = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: to skip its compiler, torch would import it, in a second of the engine's thread."""
        return False

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation; views compute nothing."""
        self.ran = self.ran or not func.is_view
        return func(*args, **(kwargs or {}))
