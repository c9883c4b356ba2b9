"""Compiles ops.cpp and its headers for this processor, or beforehand for every kind of processor of a machine.

What was compiled beforehand serves where no compiler is.

An installation compiles beforehand where neither torch nor numpy is, so nothing but Python's own library is
imported here.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Final

SOURCE = Path(__file__).with_name("ops.cpp")
"""It includes all headers beside it."""
BEFOREHAND: Final = "beforehand"
"""The folder beside the source with what was compiled beforehand."""
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-std=c++17",
    "-fopenmp",
    "-shared",
    "-fPIC",
    "-Wno-psabi",
)
TYPES: Final = ("ONLY_FLOAT32", "ONLY_BFLOAT16")
"""Parts of ops.cpp that are compiled by themselves."""
VNNI: Final = "-mavx512vnni"
"""An option that changes nothing of float32: products of integers are in the other part."""
COMPILERS: Final = ("c++", "g++", "clang++")
INTERVAL_S = 10.0
"""Between two calls of `Waiting`."""

Waiting = Callable[[int], None]
"""Is called with the seconds that passed while a command still runs: nothing here has a deadline."""
CPUINFO: Final = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Kind:
    """A kind of processors: the compiler's flags, and Linux's flags of a processor that runs the result."""

    name: str
    options: tuple[str, ...]
    needs: frozenset[str]


_V3: Final = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"])
_V4: Final = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
_VNNI: Final = _V4 | frozenset(["avx512_vnni"])
KINDS: Final = {
    "x86_64": (
        Kind("avx512bf16", ("-march=x86-64-v4", "-mavx512bf16", VNNI), _VNNI | {"avx512_bf16"}),
        Kind("avx512vnni", ("-march=x86-64-v4", VNNI), _VNNI),
        Kind("avx512", ("-march=x86-64-v4",), _V4),
        Kind("avx2", ("-march=x86-64-v3",), _V3),
    ),
    "aarch64": (Kind("neon", ("-march=armv8-a",), frozenset({"asimd"})),),
}
"""Kinds by machine, the fastest first."""


def kinds_of_machine(machine: str = platform.machine()) -> tuple[Kind, ...]:
    """Return the kinds of a machine, this one's by default."""
    return KINDS.get(machine, ())


def kinds_that_run(cpuinfo: Path = CPUINFO) -> list[Kind]:
    """Return those of this machine that its processor has all that they need of."""
    has = flags(cpuinfo)
    return [kind for kind in kinds_of_machine() if kind.needs <= has]


def flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Return what the processor can do, in the words of Linux; empty elsewhere."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    found = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(found, "").split())


class CompilerMissing(FileNotFoundError):
    """This machine has no C++ compiler."""

    def __init__(self) -> None:
        super().__init__(f"no C++ compiler: expected one of {', '.join(COMPILERS)}, or CXX")


def compiler() -> str | None:
    """Return the path of the C++ compiler that is used; None where there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))), None)


def compile_beforehand(
    into: Path, tell: Callable[[str], None] = lambda _: None, machine: str = platform.machine()
) -> list[Path]:
    """Compile for every kind of processor of a machine what is not there yet; return all of it.

    As many compilers run as there are cores; tell is called with a line whenever one of them is done. For
    another machine than this one, CXX names a compiler of its own.

    Raises:
        CompilerMissing: something is to be compiled, and there is no compiler.
        OSError: there is no place.
        CalledProcessError: the compiler refuses.
    """
    into.mkdir(exist_ok=True)
    places = {kind: place(into, kind) for kind in kinds_of_machine(machine)}
    if missing := {kind: path for kind, path in places.items() if not path.is_file()}:
        found = compiler()
        if found is None:
            raise CompilerMissing
        _compile_kinds(found, missing, into, tell)
    return list(places.values())


def _compile_kinds(compiler: str, places: Mapping[Kind, Path], into: Path, tell: Callable[[str], None]) -> None:
    """Compile libraries of several kinds; parts that are the same for some of them are compiled once."""
    began, cores = time.monotonic(), os.cpu_count() or 1
    with tempfile.TemporaryDirectory(dir=into) as folder, ThreadPoolExecutor(cores) as pool:
        # those that take longest come first
        parts = dict.fromkeys((only, _flags_of_part(only, kind)) for only in reversed(TYPES) for kind in places)
        objects = {part: str(Path(folder) / f"{number}.o") for number, part in enumerate(parts)}
        names = ", ".join(kind.name for kind in places)
        tell(f"compiling {len(parts)} parts, {min(cores, len(parts))} at a time, for the processors {names}")
        compiled = [pool.submit(run, _compiling(compiler, *part, to)) for part, to in objects.items()]
        try:
            for done, each in enumerate(as_completed(compiled), 1):
                each.result()
                tell(f"compiled {done} of {len(parts)} parts, {time.monotonic() - began:.0f} s so far")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        for kind, path in places.items():
            made = [objects[only, _flags_of_part(only, kind)] for only in TYPES]
            _link(compiler, flags_of(kind), made, Path(folder), path)


def _compiling(compiler: str, only: str, flags: Sequence[str], to: str) -> list[str]:
    return [compiler, *flags, "-c", f"-D{only}", str(SOURCE), "-o", to]


def _link(
    compiler: str,
    flags: Sequence[str],
    objects: Iterable[str],
    folder: Path,
    target: Path,
    waiting: Waiting = lambda _: None,
    began: float | None = None,
) -> None:
    made = folder / target.name
    run([compiler, *flags, *objects, "-o", str(made)], waiting=waiting, began=began)
    made.replace(target)


def reason(error: subprocess.CalledProcessError) -> str:
    """Return what a command that failed printed about it, in a line."""
    lines = error.stderr.strip().splitlines() or [f"status {error.returncode}"]
    line = next((line for line in lines if "error" in line), lines[0])
    return f"{Path(error.cmd[0]).name} failed: {line[:160]}"


def compile_library(
    compiler: str, flags: Sequence[str], target: Path, waiting: Waiting = lambda _: None
) -> None:
    """Compile all types at the same time: a start waits for it. Raise OSError where there is no place, and
    CalledProcessError, with its stderr, where the compiler refuses.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = {only: str(Path(folder) / f"{only}.o") for only in TYPES}
        compiled = (_compiling(compiler, only, flags, to) for only, to in objects.items())
        run(*compiled, waiting=waiting, began=began)
        _link(compiler, flags, objects.values(), Path(folder), target, waiting, began)


def run(*commands: list[str], waiting: Waiting = lambda _: None, began: float | None = None) -> None:
    """Run commands side by side; an exception ends all of them. What began earlier is waited for since then.
    Raise OSError where one does not start, and CalledProcessError where one fails.
    """
    began = time.monotonic() if began is None else began
    calls = (time.monotonic() - began) // INTERVAL_S
    running: list[subprocess.Popen[str]] = []
    try:
        # our own source, flags and module; the operator's compiler
        running.extend(subprocess.Popen(each, stdout=DEVNULL, stderr=PIPE, text=True) for each in commands)  # noqa: S603
        for process in running:
            while True:
                left = began + (calls + 1) * INTERVAL_S - time.monotonic()
                try:
                    _, printed = process.communicate(timeout=max(0.0, left))
                    break
                except subprocess.TimeoutExpired:
                    calls += 1
                    waiting(round(time.monotonic() - began))
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, process.args, stderr=printed)
    finally:
        for process in running:
            with process:
                process.kill()


def place(folder: Path, kind: Kind) -> Path:
    """Return where a library lies; its name changes with source and flags, so other versions are not met."""
    key = hashlib.sha256(source() + repr(flags_of(kind)).encode()).hexdigest()[:16]
    return folder / f"ops-{kind.name}-{key}.so"


def source() -> bytes:
    """Return all that is compiled."""
    headers = sorted(SOURCE.parent.glob("*.h"))
    return b"\0".join(path.read_bytes() for path in (SOURCE, *headers))


def flags_of(kind: Kind) -> list[str]:
    """Return what the compiler is given for a kind of processor."""
    return [*(flag for flag in FLAGS if flag != "-march=native"), *kind.options]


def _flags_of_part(only: str, kind: Kind) -> tuple[str, ...]:
    return tuple(flag for flag in flags_of(kind) if (only, flag) != ("ONLY_FLOAT32", VNNI))
