"""The device and the operations of a replica, for its operators."""

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
    "a token takes 1.2 to 2.4 times as long, with weights of 8 bits 3.2 to 5.2 times (measured with a model of "
    "135M parameters, 1 and 8 streams)"
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
    """The chosen device and operations."""

    backend: str = "torch"
    """native, torch or triton."""
    how: str = "torch operations"
    """Origin of the operations, and the reason if they are torch's."""
    lack: Lack | None = None
    product: str = ""
    """Type in which weights are multiplied, and the reason."""
    token_bytes: int = 0
    """Bytes of weights that one token reads; 0 while they are not known."""
    bytes_per_s: float = 0.0
    """Bytes of weights a second that products read at best: measured; 0 where it was not."""

    @property
    def token_s(self) -> float | None:
        """Return the least seconds of a token; None where they are not known."""
        return self.token_bytes / self.bytes_per_s if self.token_bytes and self.bytes_per_s else None

    @property
    def reading(self) -> str:
        """Return the sizes and speeds behind it, as far as they are known; for a person."""
        size = f"{self.token_bytes / 1e9:.3g} GB of weights a token" if self.token_bytes else ""
        speed = f"{self.bytes_per_s / 1e9:.3g} GB/s measured" if self.bytes_per_s else ""
        both = ", ".join(filter(None, (size, speed)))
        return both if self.token_s is None else f"{both}: at best {1e3 * self.token_s:.3g} ms a token"

    @property
    def warning(self) -> str | None:
        """Return the slower part, its cost and its cure; None where nothing is slower than it could be."""
        return None if self.lack is None else f"{self.how}: {COST}; {CURES[self.lack]}"


UNKNOWN: Final = Computing()
"""Operations of a replica of which nothing is known."""
