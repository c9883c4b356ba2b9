"""Builder processes that publish one deployment at once, on a real store that ignores conditional writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loramux_shared.bundle.claims import claimed_numbers, generation_numbers
from loramux_shared.bundle.deployments import current_generation, read_generation
from loramux_shared.storage.open import open_store
from tests.support.s3_gateway import S3Server

PROCESSES, EACH = 3, 6

SCRIPT = """
import sys
from datetime import UTC, datetime
from loramux_shared.bundle.deployments import publish_generation
from loramux_shared.bundle.generation import BaseRecord, Generation
from loramux_shared.deployment import Dtype, Repository, SourceKind
from loramux_shared.storage.open import open_store
uri, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
store = open_store(uri)
base = BaseRecord(source=Repository(source=SourceKind.HF, repo="org/base", revision="0" * 40), files={})
print("ready", flush=True)
sys.stdin.readline()
for i in range(count):
    wanted = Generation(
        deployment="tiny", number=1, create_time=datetime.now(UTC), served_model_name="tiny", base=base,
        adapters={}, max_seq_len=first + i, max_lora_rank=8, lora_dtype=Dtype.BFLOAT16,
    )
    print(publish_generation(store, wanted).number, flush=True)
"""


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_racing_processes_lose_no_generation(
    tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Three processes publish six generations each at once: all are there, whole, and the highest is served."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    uri = f"file://{tmp_path}/store" if kind == "file" else f"s3://{s3_server.new_bucket()}"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, uri, str(100 * (i + 1)), str(EACH)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        for i in range(PROCESSES)
    ]
    store, seen = open_store(uri), []
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    while any(racer.poll() is None for racer in racers):
        generation = current_generation(store, "tiny")  # never a mix, never damaged
        seen.append(generation.number if generation else 0)
    numbers = [int(line) for racer in racers for line in racer.communicate(timeout=60)[0].split()]
    assert [racer.returncode for racer in racers] == [0] * PROCESSES
    assert sorted(numbers) == generation_numbers(store, "tiny")
    assert len(set(numbers)) == PROCESSES * EACH
    contents = {read_generation(store, "tiny", number).max_seq_len for number in numbers}
    assert contents == {100 * (i + 1) + j for i in range(PROCESSES) for j in range(EACH)}
    served = current_generation(store, "tiny")
    assert served is not None
    assert served.number == max(numbers)
    assert claimed_numbers(store, "tiny") == {}
    assert len(set(seen)) > 3
