"""Compiles ops.cpp and its headers once per source, compiler and processor, and loads it.

``python -m inference_service.kernels.cpu.build`` compiles it beforehand, beside the source, for every kind of
processor of this kind of machine: for an image, which has no compiler when it runs.

What is kept is code that runs as this process, so it is taken only from a folder and a file that nobody else
could have written, and only whole: a file is the sha256 of a library, and the library. It is loaded from a copy
in a folder of this process alone, so that what was checked is what runs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE

from inference_service.kernels.cpu.check import first_wrong  # and torch, whose OpenMP runtime is to be shared
from inference_service.kernels.cpu.processors import Kind, kinds_of_machine, kinds_that_run
from loramux_shared.notify import report
from loramux_shared.private import private_folder, read_private

SOURCE = Path(__file__).with_name("ops.cpp")
"""It includes all headers beside it."""
BEFOREHAND = Path(__file__).with_name("beforehand")
"""Holds what was compiled beforehand: who could write there could change this file too."""
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
TYPES = ("ONLY_FLOAT32", "ONLY_BFLOAT16")
"""What of ops.cpp is compiled by itself."""
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT_S = 120
DIGEST_SIZE = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Built:
    """The library, or why there is none."""

    library: ctypes.CDLL | None
    how: str
    """For the start line."""


def load(cache_dir: Path, beforehand: Path = BEFOREHAND) -> Built:
    """Return the compiled operations, once they compute what they should; they are kept in cache_dir.

    Where they cannot be compiled, those that were compiled beforehand will do.
    """
    made = _made_here(cache_dir)
    return made if made.library else _made_beforehand(beforehand) or made


def compile_beforehand(into: Path) -> None:
    """Compile for every kind of processor of this kind of machine.

    Raises:
        OSError: there is no compiler, or no place.
        CalledProcessError: the compiler refuses.
    """
    compiler = _compiler()
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler: expected one of {', '.join(COMPILERS)}, or CXX")
    into.mkdir(exist_ok=True)
    for kind in kinds_of_machine():
        _compile(compiler, _flags(kind), _place(into, kind))


def _made_beforehand(folder: Path) -> Built | None:
    for kind in kinds_that_run():
        path = _place(folder, kind)
        if path.is_file() and first_wrong(library := ctypes.CDLL(str(path))) is None:
            return Built(library, f"compiled beforehand for {kind.name}")
    return None


def _place(folder: Path, kind: Kind) -> Path:
    """A name that changes with the source and the flags, so that what another version left is not met."""
    key = hashlib.sha256(_source() + repr(_flags(kind)).encode()).hexdigest()[:16]
    return folder / f"ops-{kind.name}-{key}.so"


def _source() -> bytes:
    headers = sorted(SOURCE.parent.glob("*.h"))
    return b"\0".join(path.read_bytes() for path in (SOURCE, *headers))


def _flags(kind: Kind) -> list[str]:
    return [*(flag for flag in FLAGS if flag != "-march=native"), *kind.options]


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))), None)


def _made_here(cache_dir: Path) -> Built:
    compiler = _compiler()
    if compiler is None:
        return Built(None, "torch operations (no C++ compiler found)")
    try:
        return _load(compiler, cache_dir)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"status {error.returncode}"]
        return Built(None, f"torch operations ({Path(error.cmd[0]).name} failed: {lines[0][:160]})")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Built(None, f"torch operations (cannot compile: {type(error).__name__})")


def _load(compiler: str, cache_dir: Path) -> Built:
    why_not_kept = private_folder(cache_dir)
    kept = cache_dir / f"ops-{_key(compiler)}.sealed"
    code = None if why_not_kept else _opened(read_private(kept))
    writable = not why_not_kept and os.access(cache_dir, os.W_OK)
    with tempfile.TemporaryDirectory(dir=cache_dir if writable else None) as folder:
        library = Path(folder) / "ops.so"
        if code is None:
            report("compiling operations for this processor, once")
            _compile(compiler, FLAGS, library)
            _try_out(library)
            if writable:
                _keep(library.read_bytes(), Path(folder) / kept.name, kept)
        else:
            library.write_bytes(code)
        loaded = ctypes.CDLL(str(library))
    wrong = first_wrong(loaded)
    if wrong is not None:
        return Built(None, f"torch operations (the compiled {wrong} computes something else)")
    unkept = f", not kept: {cache_dir} {why_not_kept}" if why_not_kept else ""
    return Built(loaded, f"compiled with {Path(compiler).name}{unkept}")


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


def _compile(compiler: str, flags: Sequence[str], target: Path) -> None:
    """Compile all types at the same time: a start waits for it."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = {only: str(Path(folder) / f"{only}.o") for only in TYPES}
        _run(*([compiler, *flags, "-c", f"-D{only}", str(SOURCE), "-o", to] for only, to in objects.items()))
        _run([compiler, *flags, *objects.values(), "-o", str(target)])


def _try_out(library: Path) -> None:
    """Run every operation in a process of its own, which an instruction that the processor lacks would end."""
    _run([sys.executable, "-W", "ignore", "-m", first_wrong.__module__, str(library)])


def _run(*commands: list[str]) -> None:
    """Run commands side by side; whatever ends this ends all of them."""
    running: list[subprocess.Popen[str]] = []
    try:
        # our own source, flags and module; the operator's compiler
        running.extend(subprocess.Popen(each, stdout=DEVNULL, stderr=PIPE, text=True) for each in commands)  # noqa: S603
        for process in running:
            _, said = process.communicate(timeout=TIMEOUT_S)
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, process.args, stderr=said)
    finally:
        for process in running:
            with process:
                process.kill()


def _key(compiler: str) -> str:
    """A name that changes with the source, the flags, the compiler and the processor."""
    stat = Path(compiler).resolve().stat()
    parts = [_source(), repr((FLAGS, compiler, stat.st_size, stat.st_mtime_ns)).encode()]
    parts.append(_processor().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


if __name__ == "__main__":
    compile_beforehand(BEFOREHAND)
