"""The kinds of processors for which the operations are compiled beforehand, for where no compiler is."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Final

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
        Kind("avx512bf16", ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"), _VNNI | {"avx512_bf16"}),
        Kind("avx512vnni", ("-march=x86-64-v4", "-mavx512vnni"), _VNNI),
        Kind("avx512", ("-march=x86-64-v4",), _V4),
        Kind("avx2", ("-march=x86-64-v3",), _V3),
    ),
    "aarch64": (Kind("neon", ("-march=armv8-a",), frozenset({"asimd"})),),
}
"""Kinds by machine, the fastest first."""


def kinds_of_machine() -> tuple[Kind, ...]:
    """Return what can be compiled here without another machine's compiler."""
    return KINDS.get(platform.machine(), ())


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
