"""``loramux up`` with the real services, as a person runs it."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from loramux import Client
from loramux.cli.main import app
from loramux.faults import ModelNotFound
from loramux.records import Delta, Finished, Started
from tests.support.tiny import make_world
from tests.support.up import Up, up
from tests.support.waiting import BOUND_S, wait_until


def _children(served: Up) -> list[psutil.Process]:
    return psutil.Process(served.process.pid).children(recursive=True)


def _assert_end(children: list[psutil.Process]) -> None:
    """Wait until none runs; one that ended counts, though nobody may have asked for its status yet."""
    assert len(children) >= 2
    wait_until(
        lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in children),
        "the end of all children",
        lambda: children,
    )


@pytest.mark.sweep
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_up_serves_until_a_signal_and_finishes_its_streams(tmp_path: Path, number: signal.Signals) -> None:
    """A stream that is open at SIGTERM or Ctrl-C comes to its end, the exit status is 0, no process is left."""
    with up(tmp_path) as served, Client(served.grpc) as client:
        children = _children(served)
        stream = client.generate("pirate", "Tell me about the sea.", max_tokens=60, ignore_eos=True)
        assert isinstance(next(stream), Started)
        os.kill(served.process.pid, number)
        events = list(stream)
        assert isinstance(events[-1], Finished)
        assert sum(len(event.token_ids) for event in events if isinstance(event, Delta)) == 60
        assert served.process.wait(BOUND_S) == 0
    _assert_end(children)


def _changed(builder: str, *words: str | Path) -> int:
    """Run a command that changes the deployment, in this process; return the generation that it names."""
    ended = CliRunner().invoke(app, [*map(str, words), "--builder", builder, "--json"])
    assert ended.exit_code == 0, ended.stderr
    return int(re.findall(r'"generation": ?([0-9]+)', ended.stdout)[-1])


def test_what_is_changed_is_served_without_a_restart(tmp_path: Path) -> None:
    """Pushed, removed and rolled back by commands: the next request that names the generation finds it so, and
    a stream that began before ends on what it began with."""
    world = make_world(tmp_path)
    file = tmp_path / "deployment.yaml"
    file.write_text(json.dumps(world.deployment().model_dump(mode="json")))
    with (
        up(tmp_path, file, "--dtype", "float32", "--threads", "1") as served,
        Client(served.grpc) as client,
    ):
        builder = served.builder
        output = (tmp_path / "up.log").read_text()
        doing = r"  importing torch\n  reading the base, .* GB\n  loading [0-9]+ adapters\n"
        assert re.search(doing, output.replace("  compiling operations for this processor, once\n", "")), output

        def ask(model: str, generation: int) -> Started:
            events = list(client.generate(model, "HELLO", max_tokens=4, min_generation=generation))
            assert isinstance(events[0], Started)
            assert isinstance(events[-1], Finished)
            return events[0]

        wide = ask("wide", 1)
        running = client.generate("wide", "HELLO", max_tokens=200, ignore_eos=True)
        assert isinstance(next(running), Started)
        pushed = _changed(builder, "push", world.adapters["rs"], "--name", "wide")
        changed = ask("wide", pushed)
        assert changed.generation == pushed > wide.generation
        assert changed.adapter_digest == ask("rs", pushed).adapter_digest != wide.adapter_digest
        assert isinstance(list(running)[-1], Finished)
        removed = _changed(builder, "remove", "all")
        with pytest.raises(ModelNotFound):
            ask("all", removed)
        back = _changed(builder, "rollback", "tiny", "--to", str(wide.generation))
        assert ask("wide", back).adapter_digest == wide.adapter_digest
        ask("all", back)


@pytest.mark.sweep  # with scripted services, started by the same code, in test_cli_processes
def test_a_killed_parent_takes_its_children_along(tmp_path: Path) -> None:
    """kill -9 of `loramux up` leaves no service behind."""
    with up(tmp_path) as served:
        children = _children(served)
        served.process.kill()
        served.process.wait(BOUND_S)
        _assert_end(children)
