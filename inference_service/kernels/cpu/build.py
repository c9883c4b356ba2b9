"""Compiles ops.cpp once per source, compiler and processor, and loads it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch  # noqa: F401 - loads the OpenMP runtime that the operations are to share

SOURCE = Path(__file__).with_name("ops.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT_S = 120


@dataclass(frozen=True)
class Built:
    """The library, or why there is none."""

    library: ctypes.CDLL | None
    how: str
    """For the start line."""


def load(cache_dir: Path) -> Built:
    """Return the compiled operations; the library is kept in cache_dir."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))), None)
    if compiler is None:
        return Built(None, "torch operations (no C++ compiler found)")
    target = cache_dir / f"ops-{_key(compiler)}.so"
    try:
        if not target.exists():
            _compile(compiler, target)
        return Built(ctypes.CDLL(str(target)), f"compiled with {Path(compiler).name}")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        return Built(None, f"torch operations ({Path(compiler).name} failed: {lines[0][:160]})")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Built(None, f"torch operations (cannot compile: {type(error).__name__})")


def _compile(compiler: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "ops.so"
        subprocess.run(  # noqa: S603 - our own source and flags, the operator's compiler
            [compiler, *FLAGS, str(SOURCE), "-o", str(made)],
            check=True,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        made.replace(target)


def _key(compiler: str) -> str:
    """A name that changes with the source, the flags, the compiler and the processor."""
    stat = Path(compiler).resolve().stat()
    parts = [SOURCE.read_bytes(), repr((FLAGS, compiler, stat.st_size, stat.st_mtime_ns)).encode()]
    parts.append(_processor().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
