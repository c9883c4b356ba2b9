"""``loramux up`` on the demo's deployment, as a person runs it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from loramux import Client
from loramux.cli.main import app
from loramux.faults import ModelNotFound
from loramux.records import Delta, Finished, Started
from tests.e2e.real import EXAMPLES, deployment
from tests.support.up import up


def _children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def _left(children: list[psutil.Process]) -> list[psutil.Process]:
    """Return those that do not end; one that ended counts, though nobody may have asked for its status yet."""
    _, alive = psutil.wait_procs(children, timeout=10)
    return [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.sweep
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_up_serves_until_a_signal_and_finishes_its_streams(tmp_path: Path, number: signal.Signals) -> None:
    """A stream that is open at SIGTERM or Ctrl-C comes to its end, the exit status is 0, no process is left."""
    names = set(deployment().build.lora_adapters)
    with up(tmp_path) as served, Client(served.grpc) as client:
        process, children = served.process, _children(served.process)
        assert {model.name for model in client.models()} >= names
        stream = client.generate("pirate", "Tell me about the sea.", max_tokens=60, ignore_eos=True)
        assert isinstance(next(stream), Started)
        os.kill(process.pid, number)
        events = list(stream)
        assert isinstance(events[-1], Finished)
        assert sum(len(event.token_ids) for event in events if isinstance(event, Delta)) == 60
        assert process.wait(30) == 0
    assert children
    assert not _left(children)


def _changed(builder: str, *words: str | Path) -> int:
    """Run a command that changes the deployment, in this process; return the generation that it names."""
    ended = CliRunner().invoke(app, [*map(str, words), "--builder", builder, "--json"])
    assert ended.exit_code == 0, ended.stderr
    return int(re.findall(r'"generation": ?([0-9]+)', ended.stdout)[-1])


def test_what_is_changed_is_served_without_a_restart(tmp_path: Path) -> None:
    """Pushed, removed and rolled back by commands: the next request that names the generation finds it so, and
    a stream that began before ends on what it began with."""
    with up(tmp_path) as served, Client(served.grpc) as client:
        builder = served.builder

        def ask(model: str, generation: int) -> Started:
            events = list(client.generate(model, "Hello", max_tokens=4, min_generation=generation))
            assert isinstance(events[0], Started)
            assert isinstance(events[-1], Finished)
            return events[0]

        pirate = ask("pirate", 1)
        running = client.generate("pirate", "Tell me about the sea.", max_tokens=100, ignore_eos=True)
        assert isinstance(next(running), Started)
        pushed = _changed(builder, "push", EXAMPLES / "adapters" / "bard", "--name", "pirate")
        changed = ask("pirate", pushed)
        assert changed.generation == pushed > pirate.generation
        assert changed.adapter_digest == ask("bard", pushed).adapter_digest != pirate.adapter_digest
        assert isinstance(list(running)[-1], Finished)
        removed = _changed(builder, "remove", "json")
        with pytest.raises(ModelNotFound):
            ask("json", removed)
        back = _changed(builder, "rollback", deployment().model_name, "--to", str(pirate.generation))
        assert ask("pirate", back).adapter_digest == pirate.adapter_digest
        ask("json", back)


@pytest.mark.sweep  # with scripted services, started by the same code, in test_cli_processes
def test_a_killed_parent_takes_its_children_along(tmp_path: Path) -> None:
    """kill -9 of `loramux up` leaves no service behind."""
    with up(tmp_path) as served:
        process, children = served.process, _children(served.process)
        assert len(children) >= 2
        process.kill()
        process.wait(10)
        assert not _left(children)
