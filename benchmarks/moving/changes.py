"""Changes through the builder: a pushed adapter's first token, and one added among 500."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks import serving
from benchmarks.moving.builder import Builder, builder
from benchmarks.moving.figures import Figure, formatted, ratio
from benchmarks.moving.forge import RANK, Forge
from benchmarks.moving.replica import bank_gb, prompt
from benchmarks.moving.server import first_token_s, server
from loramux import AsyncClient

PUSHES: Final = 8
"""Pushes of a round."""
PUSH_BAR_MS: Final = 300.0
AMONG: Final = 500
ADD_BAR: Final = 1.5
BYTES_BAR: Final = 1.1
"""Times those of a deployment of one; generations name all adapters, and are read and written too."""
PROMPT: Final = 8


async def measure_push(forge: Forge, rounds: int) -> list[Figure]:
    """Measure from the beginning of PutAdapter to the first token of a request that asks for its generation."""
    forge.deploy("push", 1)
    reported: list[float] = []
    published: list[float] = []
    versions = _versions(forge)
    with (
        builder(forge) as building,
        server(forge, "push", builder=building.grpc, adapter_memory_gb=bank_gb(16)) as running,
    ):
        async with AsyncClient(inference=running.grpc, builder=building.grpc) as client:
            for _ in range(1 + rounds * PUSHES):
                files = next(versions)
                began = time.perf_counter()
                pushed = await client.push("push", "pushed", files)
                published.append(time.perf_counter() - began)
                newest = pushed.generation
                await first_token_s(client, "pushed", prompt(PROMPT), min_generation=newest)
                reported.append(time.perf_counter() - began)
    first, *rest = (1e3 * seconds for seconds in reported)
    note = f"{formatted(rest)}; the very first {first:.0f} ms"
    return [
        Figure("push to the first token, median", statistics.median(rest), "ms", PUSH_BAR_MS, note),
        Figure("of that until it is published, median", 1e3 * statistics.median(published[1:]), "ms"),
    ]


async def measure_add(forge: Forge, rounds: int) -> list[Figure]:
    """``loramux add`` to a deployment of 500 and to one of one, in turn; bytes are those of the builder."""
    forge.deploy("one", 1)
    forge.deploy("among", 1, AMONG)
    versions = _versions(forge)
    seconds: dict[str, list[float]] = {"one": [], "among": []}
    read: dict[str, list[float]] = {"one": [], "among": []}
    written: dict[str, list[float]] = {"one": [], "among": []}
    with builder(forge) as building:
        for number in range(rounds + 1):
            for deployment, took in seconds.items():
                folder = _save(forge.work / "added" / f"{deployment}-{number}", next(versions))
                before = building.moved
                took.append(_add(building, deployment, folder))
                after = building.moved
                read[deployment].append(float(after[0] - before[0]))
                written[deployment].append(float(after[1] - before[1]))
    for found in (*seconds.values(), *read.values(), *written.values()):
        del found[0]  # what a builder does once
    note = f"{formatted(seconds['among'])}; to one {formatted(seconds['one'], unit='s')}"
    return [
        Figure("loramux add among 500 / to one: seconds", ratio(*_pair(seconds)), "x", ADD_BAR, note),
        Figure(
            "the same: bytes read", ratio(*_pair(read)), "x", BYTES_BAR, formatted(read["among"], 1e-6, "MB")
        ),
        Figure(
            "the same: bytes written",
            ratio(*_pair(written)),
            "x",
            BYTES_BAR,
            formatted(written["among"], 1e-6, "MB"),
        ),
    ]


def _pair(found: dict[str, list[float]]) -> tuple[list[float], list[float]]:
    return found["among"], found["one"]


def _add(building: Builder, deployment: str, folder: Path) -> float:
    arguments = (
        "added",
        str(folder),
        "--source",
        "LOCAL",
        "--deployment",
        deployment,
        "--builder",
        building.grpc,
    )
    return building.run("add", *arguments)


def _versions(forge: Forge) -> Iterator[dict[str, bytes]]:
    """Yield adapters of rank 16 that no store has yet: an own one for each run, with some signs changed."""
    source = forge.work / "versions" / "lora0"
    if not source.exists():
        serving.make_adapters(source.parent, 1, RANK)
    config = (source / "adapter_config.json").read_bytes()
    weights = (source / "adapter_model.safetensors").read_bytes()
    run = time.time_ns() & 0xFFFFFFFF
    length = 8 + int.from_bytes(weights[:8], "little")
    assert json.loads(weights[8:length])  # noqa: S101 - signs are those of values, not of the header
    for number in itertools.count():
        changed = bytearray(weights)
        for place in range(64):
            if (run << 32 | number) >> place & 1:
                changed[length + 2 * place + 1] ^= 0x80
        yield {"adapter_config.json": config, "adapter_model.safetensors": bytes(changed)}


def _save(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
