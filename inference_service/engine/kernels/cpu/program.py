"""Calls of compiled operations, written down once and run again in one call.

Between two operations of a step the interpreter takes some 3 us: it allocates an output, and turns arguments
into those of C. A step of a small base has 240 operations and takes some 8 ms.
"""

import ctypes
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Final, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inference_service.engine.kernels.rows import Activation

Words = npt.NDArray[np.int64]
Argument = int | float | None
Place = tuple[int, int]
"""A linear as `NativeLora` knows it: its bit, and the address of its table."""
CODES: Final = {
    name: code
    for code, name in enumerate(
        (
            "linear",
            "attention",
            "rope_write",
            "rms_norm",
            "layer_norm",
            "add",
            *get_args(Activation),
            "exchange",
        )
    )
}
"""The operations that a program may have, by their places in ``run``."""
ALIGNMENT: Final = 64
"""Bytes, as torch aligns."""


class Program:
    """Operations with their arguments; what these point to must stay where it is."""

    def __init__(self, words: list[int], count: int, run: Callable[[int, int], None]) -> None:
        self.words: Words = np.array(words, dtype=np.int64)
        self._address: int = self.words.ctypes.data
        self.count, self._run = count, run

    def run(self) -> None:
        """Run all of them, in order; the interpreter's lock is free meanwhile."""
        self._run(self._address, self.count)


class Buffers:
    """Memory of outputs that does not move, used again once the interpreter has let go of an output."""

    def __init__(self, most_rows: int) -> None:
        self._most_rows = most_rows
        self._free: dict[int, list[npt.NDArray[np.uint8]]] = {}
        self._all: dict[int, npt.NDArray[np.uint8]] = {}
        """The buffers by their addresses."""

    def lend(self, shape: Sequence[int], dtype: torch.dtype, rows: int) -> Tensor:
        """Return an output of a step of so many rows; steps of up to the most rows use the same memory."""
        size = prod(shape) * dtype.itemsize
        room = -(-size // rows) * self._most_rows
        free = self._free.setdefault(room, [])
        buffer = free.pop() if free else self._new(room)
        lent = buffer[:size]  # a separate array, which lives as long as a tensor has its memory
        weakref.finalize(lent, free.append, buffer).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)

    def at(self, output: Tensor) -> Tensor:
        """Return the values of an output, whose memory may be used again meanwhile."""
        buffer = self._all[output.data_ptr()]
        size = output.numel() * output.dtype.itemsize
        return torch.from_numpy(buffer[:size]).view(output.dtype).view(output.shape)

    def _new(self, room: int) -> npt.NDArray[np.uint8]:
        raw = np.empty(room + ALIGNMENT, dtype=np.uint8)
        first = -raw.ctypes.data % ALIGNMENT
        buffer = raw[first : first + room]
        self._all[buffer.ctypes.data] = buffer
        return buffer


class Recorder:
    """Writes down the operations that the thread that made it calls, with their arguments."""

    def __init__(self, buffers: Buffers, rows: int, run: Callable[[int, int], None]) -> None:
        """Take memory for outputs of a step of so many rows, and what runs programs."""
        self._thread = threading.get_ident()
        self._buffers, self._rows, self._run = buffers, rows, run
        self._words: list[int] = []
        self._count = 0
        self._place: Place | None = None
        self.linears: list[tuple[int, Place | None]] = []
        """The place among the words where each linear's arguments begin, and the linear if it has adapters."""

    @property
    def here(self) -> bool:
        """True on the thread whose operations are written down."""
        return threading.get_ident() == self._thread

    def note(self, place: Place) -> None:
        """Say which linear the next one is."""
        self._place = place

    def wrapped(self, name: str, function: Any) -> Callable[..., None]:
        """Return a function that calls an operation of the library and writes it down."""
        code, types = CODES[name], function.argtypes

        def call(*arguments: Argument) -> None:
            if self.here:
                if name == "linear":
                    self.linears.append((len(self._words) + 1, self._place))
                    self._place = None
                self._words += [code, *map(_word, arguments, types)]
                self._count += 1
            function(*arguments)

        return call

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return an output."""
        return self._buffers.lend(shape, dtype, self._rows) if self.here else torch.empty(*shape, dtype=dtype)

    def kept(self, output: Tensor) -> Tensor:
        """Return an output that is valid after its memory is used again."""
        return self._buffers.at(output)

    def program(self) -> Program:
        """Return what was written down, to be run again."""
        return Program(self._words, self._count, self._run)


def _word(argument: Argument, kind: type) -> int:
    if kind is ctypes.c_float:
        return int.from_bytes(struct.pack("=f", argument), sys.byteorder)
    return int(argument or 0)
