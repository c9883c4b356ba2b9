"""Compiled operations: compiled once for all workers and later runs, and opened and checked once in a process.

A start times them, and this does not: what is faster now and then would give answers other last bits then.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Final

import pytest
from filelock import FileLock

from inference_service.engine.kernels.cpu import build, compiling
from inference_service.engine.kernels.cpu.build import Built, load
from inference_service.startup import choose
from tests.support.examples import SWEEPING

NATIVE: Final = Path(os.environ["LORAMUX_CACHE_DIR"]) / "native"
NATIVE.parent.mkdir(parents=True, exist_ok=True)
COMPILING: Final = FileLock(f"{NATIVE}.lock")
"""Lets one worker compile, while others wait for what it made."""


def compiled_as_in_a_wheel(compiler: str) -> Path:
    """Return a folder with what a wheel has, by this compiler."""
    with pytest.MonkeyPatch.context() as patch, COMPILING:
        as_in_a_wheel(patch)
        folder = NATIVE.with_name(f"beforehand-{build.key_of(compiler)}")
        compiling.compile_beforehand(folder)
    return folder


def as_in_a_wheel(patch: pytest.MonkeyPatch) -> None:
    """Compile as for a wheel, but quicker: kinds of processors differ in the source that they choose."""
    if not os.environ.get(SWEEPING):
        flags = tuple(flag.replace("-O3", "-O0") for flag in compiling.FLAGS)
        patch.setattr(compiling, "FLAGS", flags)


@contextmanager
def reuse_native() -> Iterator[None]:
    """Reuse operations that this process has opened and checked in the same folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "rows_from_which_torch_is_faster", lambda *_: None)
        if build.load is load:
            patch.setattr(build, "load", open_native)
        yield


def open_native(folder: Path) -> Built:
    return _opened(folder, os.environ.get("PATH"), os.environ.get("CXX"))


@cache
def _opened(folder: Path, *_compilers: str | None) -> Built:
    with COMPILING:
        return load(folder)
