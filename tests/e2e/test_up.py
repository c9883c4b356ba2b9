"""``loramux up`` with the real services, as a person runs it."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loramux import Client
from loramux.cli.main import app
from loramux.faults import ModelNotFound
from loramux.records import Finished, Started
from tests.support.tiny import make_world
from tests.support.up import up


def _changed(builder: str, *words: str | Path) -> int:
    """Run a command that changes the deployment, in this process; return the generation that it names."""
    ended = CliRunner().invoke(app, [*map(str, words), "--builder", builder, "--json"])
    assert ended.exit_code == 0, ended.stderr
    return int(re.findall(r'"generation": ?([0-9]+)', ended.stdout)[-1])


def test_what_is_changed_is_served_without_a_restart(tmp_path: Path) -> None:
    """A push, a removal and a rollback hold for the next request that names the generation; an older stream
    finishes with its adapter."""
    world = make_world(tmp_path)
    file = tmp_path / "deployment.yaml"
    file.write_text(json.dumps(world.deployment().model_dump(mode="json")))
    with up(tmp_path, file, "--dtype", "float32", "--threads", "1") as served, Client(served.grpc) as client:
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
        with Client(builder=builder) as operator:
            back = operator.rollback("tiny", wide.generation).generation
        assert ask("wide", back).adapter_digest == wide.adapter_digest
        ask("all", back)
