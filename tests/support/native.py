"""Compiled operations, opened and checked once in a process rather than at each of its starts, and not timed.

What is faster on this machine now and then would give answers other last bits now and then.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from inference_service.kernels.cpu import build, compiling
from inference_service.kernels.cpu.build import Built, load
from inference_service.startup import choose
from tests.support.examples import SWEEPING


def as_in_a_wheel(patch: pytest.MonkeyPatch) -> None:
    """Compile as for a wheel, but quicker: kinds of processors differ in the source that they choose."""
    if not os.environ.get(SWEEPING):
        flags = tuple(flag.replace("-O3", "-O0") for flag in compiling.FLAGS)
        patch.setattr(compiling, "FLAGS", flags)


@contextmanager
def opened_once() -> Iterator[None]:
    """Reuse operations that this process has opened and checked in the same folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "rows_from_which_torch_is_faster", lambda *_: None)
        if build.load is load:
            patch.setattr(build, "load", _cached)
        yield


def _cached(folder: Path) -> Built:
    return _opened(folder, os.environ.get("PATH"), os.environ.get("CXX"))


@cache
def _opened(folder: Path, *_compilers: str | None) -> Built:
    return load(folder)
