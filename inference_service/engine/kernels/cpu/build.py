"""Loads the compiled operations: the wheel's, or else compiled here once per source, compiler and processor.

``python -m inference_service.engine.kernels.cpu.build`` compiles beforehand, beside the source, for every
kind of processor of this kind of machine, what the wheel does not have.

What is kept is code that runs as this process, so it is taken only from a folder and a file that nobody else
could have written, and only whole: a file is the sha256 of a library, and the library. It is loaded from a copy
in a folder of this process alone, so that what was checked is what runs.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from inference_service.core.computing import Lack
from inference_service.engine.kernels.cpu import compiling
from inference_service.engine.kernels.cpu.check import (
    first_wrong,  # imports torch, whose OpenMP runtime is shared
)
from inference_service.engine.kernels.cpu.compiling import Kind, Waiting, kinds_that_run
from loramux_shared.process import private_folder, read_private, report

BEFOREHAND: Final = Path(__file__).with_name(compiling.BEFOREHAND)
"""Holds what was compiled beforehand: who could write there could change this file too."""
DIGEST_SIZE = hashlib.sha256().digest_size
UNFINISHED: Final = "unfinished-"
"""Prefix of the folder that a start compiles in, or copies what was compiled into, until it is loaded."""
LEFT_BEHIND_S: Final = 24 * 3600.0
"""Age of such a folder from which on its start was killed: no compiler takes a day."""

COMPILING: Final = "took 20 s on two idle cores, 70 s on busy ones; next: trying them out"
TRYING_OUT: Final = "took 5 s on two idle cores, 10 s on busy ones; next: reading the base"

log = structlog.get_logger()


@dataclass(frozen=True)
class Built:
    """The library, or why there is none."""

    library: ctypes.CDLL | None
    how: str
    """For the start line."""
    lack: Lack | None = None
    """None where there is a library."""


def load(cache_dir: Path, beforehand: Path | None = None) -> Built:
    """Return the compiled operations, once they compute what they should.

    Those that were compiled beforehand for the best kind that this processor is are taken first. Others are
    compiled and kept in cache_dir; where that fails, those for a lesser kind will do.
    """
    beforehand, kinds = beforehand or BEFOREHAND, kinds_that_run()
    best = _made_beforehand(beforehand, kinds[:1])
    if best is not None:
        return best
    made = _made_here(cache_dir)
    return made if made.library else _made_beforehand(beforehand, kinds[1:]) or made


def _made_beforehand(folder: Path, kinds: Sequence[Kind]) -> Built | None:
    for kind in kinds:
        path = compiling.place(folder, kind)
        if path.is_file() and first_wrong(library := ctypes.CDLL(str(path))) is None:
            return Built(library, f"compiled beforehand for {kind.name}")
    return None


def _made_here(cache_dir: Path) -> Built:
    compiler = compiling.compiler()
    if compiler is None:
        return Built(None, "torch operations (no C++ compiler found)", Lack.NO_COMPILER)
    try:
        return _load(compiler, cache_dir)
    except subprocess.CalledProcessError as error:
        return Built(None, f"torch operations ({compiling.reason(error)})", Lack.NOT_COMPILED)
    except OSError as error:
        return Built(None, f"torch operations (cannot compile: {error.strerror or error})", Lack.NOT_COMPILED)


def _load(compiler: str, cache_dir: Path) -> Built:
    why_not_kept = private_folder(cache_dir)
    sealed = cache_dir / f"ops-{key_of(compiler)}.sealed"
    code = None if why_not_kept else _opened(read_private(sealed))
    writable = not why_not_kept and os.access(cache_dir, os.W_OK)
    if writable:
        _remove_left_behind(cache_dir)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=cache_dir if writable else None) as folder:
        library = Path(folder) / "ops.so"
        if code is None:
            waiting = _announced("compiling operations", compiler, COMPILING)
            compiling.compile_library(compiler, compiling.FLAGS, library, waiting)
            try:
                _try_out(library)
            except subprocess.CalledProcessError as error:
                return Built(None, f"torch operations ({compiling.reason(error)})", Lack.WRONG_RESULT)
            if writable:
                _keep(library.read_bytes(), Path(folder) / sealed.name, sealed)
        else:
            library.write_bytes(code)
        loaded = ctypes.CDLL(str(library))
    wrong = first_wrong(loaded)
    if wrong is not None:
        how = f"torch operations (the compiled {wrong} computes something else)"
        return Built(None, how, Lack.WRONG_RESULT)
    unkept = f", not kept: {cache_dir} {why_not_kept}" if why_not_kept else ""
    return Built(loaded, f"compiled with {Path(compiler).name}{unkept}")


def _remove_left_behind(cache_dir: Path) -> None:
    """Remove folders of starts that were killed while they compiled."""
    for folder in cache_dir.glob(f"{UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > LEFT_BEHIND_S:
                shutil.rmtree(folder, ignore_errors=True)


def _announced(doing: str, command: str, expected: str) -> Waiting:
    """Say what a start waits for, its usual time and what follows, now and whenever the result is called."""
    log.info(f"{doing} for this processor, once", waits_for=command, expected=expected)
    report(f"{doing} for this processor, once: {expected}")

    def waiting(seconds: int) -> None:
        log.info(f"still {doing} for this processor", waits_for=command, seconds=seconds)
        report(f"{doing} for this processor, once: {seconds} s so far; {expected}")

    return waiting


def _keep(code: bytes, made: Path, target: Path) -> None:
    """Put a library where the next start finds it, if that is possible."""
    with suppress(OSError):
        made.touch(mode=0o600)
        made.write_bytes(_sealed(code))
        made.replace(target)


def _sealed(code: bytes) -> bytes:
    return hashlib.sha256(code).digest() + code


def _opened(sealed: bytes | None) -> bytes | None:
    """Return the library of a file that is whole."""
    code = None if sealed is None else sealed[DIGEST_SIZE:]
    return code if code is not None and sealed == _sealed(code) else None


def _try_out(library: Path) -> None:
    """Run every operation in a process of its own, which an instruction that the processor lacks would end."""
    command = [sys.executable, "-P", "-W", "ignore", "-m", first_wrong.__module__, str(library)]
    waiting = _announced("trying out operations", "a process that runs each of them", TRYING_OUT)
    compiling.run(command, waiting=waiting)


def key_of(compiler: str) -> str:
    """Return a name that changes with the source, the flags, the compiler and the processor."""
    stat = Path(compiler).resolve().stat()
    parts = [compiling.source(), repr((compiling.FLAGS, compiler, stat.st_size, stat.st_mtime_ns)).encode()]
    parts.append(_processor().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = ("model name", "flags", "Features")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(fields)))


if __name__ == "__main__":
    compiling.compile_beforehand(BEFOREHAND, log.info)
