"""``loramux up`` on the demo's deployment, as a person runs it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from loramux import Client
from loramux.records import Delta, Finished, Started
from tests.e2e.real import EXAMPLES, deployment
from tests.support.s3_gateway import free_port

READY_S = 120


@contextmanager
def _up(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `loramux up` until it is ready; yields the process and the inference address."""
    grpc, builder = (f"127.0.0.1:{free_port()}" for _ in range(2))
    command = [Path(sys.executable).parent / "loramux", "up", EXAMPLES / "deployment.yaml"]
    command += ["--store", f"file://{folder}/store", "--grpc", grpc, "--builder", builder]
    log = folder / "up.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, text=True, cwd=folder)
        try:
            deadline = time.monotonic() + READY_S
            while not re.search(r"^ready", log.read_text(), re.M):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield process, grpc
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(10)


def _children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def _left(children: list[psutil.Process]) -> list[psutil.Process]:
    """Return those that do not end; one that ended counts, though nobody may have asked for its status yet."""
    _, alive = psutil.wait_procs(children, timeout=10)
    return [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_up_serves_until_a_signal_and_finishes_its_streams(tmp_path: Path, number: signal.Signals) -> None:
    """A stream that is open at SIGTERM or Ctrl-C comes to its end, the exit status is 0, no process is left."""
    names = set(deployment().build.lora_adapters)
    with _up(tmp_path) as (process, grpc), Client(grpc) as client:
        children = _children(process)
        assert {model.name for model in client.models()} >= names
        stream = client.generate("pirate", "Tell me about the sea.", max_tokens=120, ignore_eos=True)
        assert isinstance(next(stream), Started)
        os.kill(process.pid, number)
        events = list(stream)
        assert isinstance(events[-1], Finished)
        assert sum(len(event.token_ids) for event in events if isinstance(event, Delta)) == 120
        assert process.wait(30) == 0
    assert children
    assert not _left(children)


def test_a_killed_parent_takes_its_children_along(tmp_path: Path) -> None:
    """kill -9 of `loramux up` leaves no service behind."""
    deployment()
    with _up(tmp_path) as (process, _):
        children = _children(process)
        assert len(children) >= 2
        process.kill()
        process.wait(10)
        assert not _left(children)
