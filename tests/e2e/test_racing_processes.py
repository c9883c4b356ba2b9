"""Builder processes that publish one deployment at once, on a real store that ignores conditional writes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from loramux_shared.bundle.claims import claimed_numbers, generation_numbers
from loramux_shared.bundle.deployments import current_generation, read_generation
from loramux_shared.storage.open import open_store
from tests.support.forks import Forked
from tests.support.racing import publishes
from tests.support.s3_gateway import S3Server
from tests.support.waiting import BOUND_S

PROCESSES, EACH = 3, 6


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_racing_processes_lose_no_generation(
    tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Three processes publish six generations each at once: all are there, whole, and the highest is served."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    uri = f"file://{tmp_path}/store" if kind == "file" else f"s3://{s3_server.new_bucket()}"
    ends = [multiprocessing.Pipe() for _ in range(PROCESSES)]
    racers = [
        Forked(publishes, uri, 100 * (i + 1), EACH, theirs, s3_server.environment)
        for i, (_, theirs) in enumerate(ends)
    ]
    try:
        store, seen = open_store(uri), []
        for ours, theirs in ends:
            theirs.close()
            assert ours.poll(BOUND_S)
            assert ours.recv() == "ready"
        for ours, _ in ends:
            ours.send("go")
        while any(racer.poll() is None for racer in racers):
            generation = current_generation(store, "tiny")  # never a mix, never damaged
            seen.append(generation.number if generation else 0)
        assert [racer.poll() for racer in racers] == [0] * PROCESSES
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    numbers = [ours.recv() for ours, _ in ends for _ in range(EACH)]
    assert sorted(numbers) == generation_numbers(store, "tiny")
    assert len(set(numbers)) == PROCESSES * EACH
    contents = {read_generation(store, "tiny", number).max_seq_len for number in numbers}
    assert contents == {100 * (i + 1) + j for i in range(PROCESSES) for j in range(EACH)}
    served = current_generation(store, "tiny")
    assert served is not None
    assert served.number == max(numbers)
    assert claimed_numbers(store, "tiny") == {}
    assert len(set(seen)) > 3
