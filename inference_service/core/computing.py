"""What a replica computes with, as its operators see it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Lack(StrEnum):
    """Why torch's operations stand in for compiled ones, which a CPU should have."""

    NO_COMPILER = "no_compiler"
    NOT_COMPILED = "not_compiled"
    WRONG_RESULT = "wrong_result"
    UNSUPPORTED = "unsupported"
    """They take neither the dtype, nor the block size, nor heads as wide as the model's."""


COST: Final = (
    "a token takes 1.2 to 1.9 times as long, with weights of 8 bits 3.2 to 5.2 times (measured with a model of "
    "135M parameters, AVX-512, 1 and 8 streams)"
)
CURES: Final = {
    Lack.NO_COMPILER: "install g++ (Debian: apt-get install g++) and start again, or install a wheel that was "
    "built where one is",
    Lack.NOT_COMPILED: "set CXX to g++ 11 or later, or install a wheel that was built with it",
    Lack.WRONG_RESULT: "set CXX to another compiler, and report this one",
    Lack.UNSUPPORTED: "change that setting, or set LORAMUX_NATIVE=false if this is what you want",
}


@dataclass(frozen=True)
class Computing:
    """What was chosen."""

    backend: str = "torch"
    """native, torch or triton."""
    how: str = "torch operations"
    """Where the operations come from, and why they are torch's if so."""
    lack: Lack | None = None

    @property
    def warning(self) -> str | None:
        """What is slower than it could be, what that costs and what to do; None where nothing is."""
        return None if self.lack is None else f"{self.how}: {COST}; {CURES[self.lack]}"
