"""Operators' views of adapters and of the replica. Plain and frozen, no protobuf and no JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from inference_service.core.computing import UNKNOWN, Computing
from inference_service.engine.scheduling.residents import AdapterState
from loramux_shared.operations import AdapterStatus, Tier

TIERS: Final[Mapping[AdapterState, Tier]] = {
    AdapterState.ABSENT: "store",
    AdapterState.LOADING: "store",
    AdapterState.HELD: "host",
    AdapterState.COPYING: "host",
    AdapterState.RESIDENT: "device",
}


@dataclass(frozen=True)
class AdapterPage:
    """Some of the names, in their order."""

    adapters: tuple[AdapterStatus, ...]
    next_page: str
    """Token of the next page; empty at the end."""


@dataclass(frozen=True)
class Loaded:
    """An adapter that was loaded."""

    adapter: AdapterStatus
    everywhere: bool
    """True where a generation has it, so that every replica of the deployment will; False: this one alone."""


@dataclass(frozen=True)
class Facts:
    """The facts that do not change while a replica lives."""

    deployment: str
    started: datetime
    dtype: str = ""
    """Type of computation, as torch names it."""
    max_lora_rank: int = 0
    load_s: float = 0.0
    """Seconds from the start of loading until everything was ready."""
    computing: Computing = UNKNOWN
    """The operations that compute."""
    ranks: int = 1
    """Processes that compute the base together."""
