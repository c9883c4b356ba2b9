"""The cost of registered, inactive adapters: 2,000 and 8 active against 8.

Only the active ones have bundles. Starts are those of processes, each measured alone and in turn with its peer;
steps are those of two replicas in this process, one at a time. The bars are held against seconds of processors,
which are valid on a busy machine too; seconds of the clock stand beside them.
"""

from __future__ import annotations

import asyncio
import statistics
from typing import Final

from benchmarks.moving.figures import Figure, formatted, ratio
from benchmarks.moving.forge import Forge
from benchmarks.moving.replica import Local, bank_gb, replica
from benchmarks.moving.server import server

ACTIVE: Final = 8
REGISTERED: Final = 2000
STEPS: Final = 60
STEP_BAR: Final = 1.02
START_BAR: Final = 1.2
BYTES_BAR: Final = 8000


async def measure(forge: Forge, rounds: int) -> list[Figure]:
    """2,000 registered, 8 active."""
    names = forge.deploy("few", ACTIVE)
    forge.deploy("registered", ACTIVE, REGISTERED)
    bank = bank_gb(ACTIVE)
    steps = await _steps(forge, names, rounds, bank)
    starts: dict[str, list[tuple[float, float, float]]] = {"few": [], "registered": []}
    for _ in range(rounds):
        for deployment, found in starts.items():
            with server(forge, deployment, adapter_memory_gb=bank, preload=ACTIVE) as running:
                found.append((running.start_cpu_s, running.memory_mb, running.loaded_s))
    seconds = {name: [cpu for cpu, _, _ in found] for name, found in starts.items()}
    wall = {name: [loaded for _, _, loaded in found] for name, found in starts.items()}
    memory = {name: statistics.median(mb for _, mb, _ in found) for name, found in starts.items()}
    each = (memory["registered"] - memory["few"]) * 1e6 / (REGISTERED - ACTIVE)
    note = f"{formatted(seconds['registered'])}; with 8 {formatted(seconds['few'], unit='s of CPU')}"
    return [
        *steps,
        Figure("start by the wall clock, 2,000 / 8", ratio(wall["registered"], wall["few"]), "x"),
        Figure("start, 2,000 / 8", ratio(seconds["registered"], seconds["few"]), "x", START_BAR, note),
        Figure("memory per registered adapter", each, "B", BYTES_BAR, f"{memory['few']:.0f} MB with 8"),
    ]


async def _steps(forge: Forge, names: list[str], rounds: int, bank: float) -> list[Figure]:
    found: dict[str, list[float]] = {"few": [], "registered": []}
    async with (
        replica(forge, "few", adapter_memory_gb=bank, preload=ACTIVE) as few,
        replica(forge, "registered", adapter_memory_gb=bank, preload=ACTIVE) as many,
    ):
        for _ in range(2 * rounds):
            for deployment, local in {"few": few, "registered": many}.items():
                found[deployment].append(await _step_s(local, names))
    note = f"{formatted(found['registered'], 1e3)}; with 8 {formatted(found['few'], 1e3, 'ms of CPU')}"
    best = min(found["registered"]) / min(found["few"])  # what others do to a processor only adds
    return [Figure("step, 2,000 / 8 registered, best rounds", best, "x", STEP_BAR, note)]


async def _step_s(local: Local, names: list[str]) -> float:
    """Return the median of the engine's thread's time for a step that decodes one token of each adapter."""
    async with local.streams(names):
        with local.steps() as steps:
            while len(steps.cpu_s) < STEPS:
                await asyncio.sleep(0.05)
    return statistics.median(steps.cpu_s)
