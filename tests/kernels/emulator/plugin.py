"""A plugin of pytest that replaces compiled operations by those of an emulated process."""

import ctypes
import os
import struct
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from inference_service.engine.backends import native_lora
from inference_service.engine.kernels.cpu import build
from inference_service.engine.kernels.cpu.build import Built
from tests.kernels.emulator import EMULATOR, HEAP, SERVER

NAME, ARGUMENTS, TEXT = 32, 32, 56
"""Bytes, values and bytes of the structures in ``server.cpp``."""


class Function:
    """An operation with the attributes of a function of ctypes."""

    argtypes: tuple[Any, ...] = ()
    restype: Any = None

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self._process, self._name = process, name

    def __call__(self, *arguments: float | bytes | None) -> int | bytes:
        """Call the operation with addresses, bytes, whole numbers and floats."""
        assert self._process.stdin
        assert self._process.stdout
        values = [
            struct.pack("<d", value) if kind is ctypes.c_float else struct.pack("<q", _whole(value))
            for kind, value in zip(self.argtypes, arguments, strict=True)
        ]
        call = self._name.encode().ljust(NAME, b"\0") + b"".join(values).ljust(8 * ARGUMENTS, b"\0")
        self._process.stdin.write(call)
        self._process.stdin.flush()
        answer = self._process.stdout.read(8 + TEXT)
        assert len(answer) == 8 + TEXT, f"{self._name} ended the emulated process"
        return (
            answer[8:].rstrip(b"\0") if self.restype is ctypes.c_char_p else struct.unpack("<q", answer[:8])[0]
        )


def _whole(value: float | bytes | None) -> float:
    """Return an argument as a number: the address of bytes, which lie in the heap."""
    if isinstance(value, bytes):
        return ctypes.cast(ctypes.c_char_p(value), ctypes.c_void_p).value or 0
    return value or 0


class Library:
    """All operations, as attributes."""

    def __init__(self) -> None:
        """Start the emulated process; it ends with this one."""
        command = [EMULATOR, os.environ[SERVER], os.environ[HEAP]]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._functions: dict[str, Function] = {}

    def __getattr__(self, name: str) -> Function:
        return self._functions.setdefault(name, Function(self._process, name))


@cache
def _library() -> ctypes.CDLL:
    return cast(ctypes.CDLL, Library())


def _load(cache_dir: Path, beforehand: Path | None = None) -> Built:
    """Return the emulated operations; nothing is compiled or kept."""
    del cache_dir, beforehand
    return Built(_library(), "emulated")


def _map(_: int, size: int, flags: int) -> npt.NDArray[np.uint8]:
    """Stand for `mmap.mmap`, whose memory is not of the heap."""
    del flags
    return np.zeros(size, np.uint8)


build.load = _load
vars(native_lora)["mmap"] = SimpleNamespace(MAP_PRIVATE=0, MAP_ANONYMOUS=0, PAGESIZE=4096, mmap=_map)
del os.environ["LD_PRELOAD"]  # the heap is that of this process, and not its children's
