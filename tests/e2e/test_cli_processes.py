"""The command line as processes: children, terminals, clean ends, and ``loramux up`` with the real services."""

import asyncio
import json
import os
import pty
import re
import select
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from loramux import Client, Delta
from loramux.cli.exits import Exit, exit_of
from loramux.cli.local.tree import ProcessTree, ServiceDied, free_address, run_tree
from loramux.cli.main import app
from loramux.faults import ModelNotFound, SettingsInvalid
from loramux.records import Finished, Started
from tests.e2e.exclusive import one_at_a_time
from tests.support.access import lines, new_entry
from tests.support.processes.commands import Command, start_command
from tests.support.processes.forks import command_line
from tests.support.processes.up import run_up
from tests.support.root import ROOT
from tests.support.services.fake_grpc import Fakes
from tests.support.tiny import make_world
from tests.support.waiting import BOUND_S, wait_until

BOTH = "--scope build --scope infer"


@pytest.fixture
def scripted(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An environment of scripted services, on the usual ports where these are free."""
    for kind in ("builder", "inference"):
        package = tmp_path / "fakes" / f"{kind}_service"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(
            f"from tests.support.services.fake_grpc import main; main({kind!r})\n"
        )
    path = os.pathsep.join(map(str, (tmp_path / "fakes", ROOT, ROOT / "shared")))
    state = {"TMPDIR": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
    with one_at_a_time(tmp_path_factory, "usual-ports"):
        yield {"PYTHONPATH": path, "COLUMNS": "80", **state}


def family(command: Command) -> list[psutil.Process]:
    parent = psutil.Process(command.process.pid)
    return wait_until(
        lambda: found if len(found := parent.children(recursive=True)) == 2 else [],
        "two children",
        lambda: (parent.children(recursive=True), command.errors),
    )


def assert_gone(processes: Sequence[psutil.Process]) -> None:
    wait_until(lambda: not any(map(_runs, processes)), "the end of processes", lambda: processes)


def _runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_child_that_dies_ends_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that ends unasked stops the others, and its last lines are in the fault."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the log outlives the failure
    others: list[int] = []

    async def work(tree: ProcessTree) -> None:
        other = await tree.start("other", [sys.executable, "-c", "import time; time.sleep(3600)"])
        others.append(other.process.pid)
        await tree.start("weak", [sys.executable, "-c", "print('out of memory'); raise SystemExit(3)"])
        await asyncio.Event().wait()

    with pytest.raises(ServiceDied, match="weak ended with exit status 3") as caught:
        run_tree(work)
    assert str(caught.value).endswith("| out of memory")
    assert not psutil.pid_exists(others[0])


def test_a_child_is_ready_when_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting ends with the child's own word; its progress is reported, however long the temporary path is."""
    deep = tmp_path / ("deep" * 30)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    texts: list[str] = []

    async def work(tree: ProcessTree) -> None:
        program = (
            "import time; from loramux_shared.process import notify, report, READY; print('up', flush=True); "
            "report('nearly'); notify('STATUS=up\\n' + READY); time.sleep(3600)"
        )
        await tree.serve("child", [sys.executable, "-c", program], texts.append)
        texts.append((tree.folder / "child.log").read_text())

    run_tree(work)
    assert texts == ["nearly", "up", "up\n"]


def test_a_child_names_the_failure_that_ends_it() -> None:
    """The reason that a service ends with is the tree's, with all its lines, and so is the exit code."""
    words = "noise\nbuilder_service: SETTINGS_INVALID: cannot listen.\n  E_BAD_FIELD grpc: found x\nmore noise"

    async def work(tree: ProcessTree) -> None:
        await tree.serve("builder", [sys.executable, "-c", f"import sys; print({words!r}); sys.exit(2)"])

    with pytest.raises(SettingsInvalid) as caught:
        run_tree(work)
    assert str(caught.value) == "builder: cannot listen.\n  E_BAD_FIELD grpc: found x"
    assert exit_of(caught.value) is Exit.USAGE


@pytest.mark.parametrize("flag", ["--grpc", "--http", "--builder"])
def test_up_on_a_taken_address(fakes: Fakes, deployment: Callable[..., str], flag: str) -> None:
    """The command ``up`` reports an occupied address before it starts anything."""
    args = ["up", deployment("tiny", "lora1"), flag, fakes.inference_address, "--json"]
    ended = CliRunner().invoke(app, args)
    assert ended.exit_code == 2
    assert [json.loads(line)["error"]["reason"] for line in ended.stdout.splitlines()] == ["SETTINGS_INVALID"]
    assert f"cannot listen on '{fakes.inference_address}' (Address already in use)" in ended.stderr
    assert "service on" not in ended.stderr


@pytest.fixture
def keys(tmp_path: Path) -> tuple[str, dict[str, str]]:
    """A file of keys, and one by its scopes."""
    file = tmp_path / "keys.jsonl"
    made = {
        words: new_entry(words.replace(" ", ""), *words.replace("--scope ", "").split())
        for words in ("--scope infer", BOTH)
    }
    file.write_text(lines(*(entry for _, entry in made.values())))
    return str(file), {words: key for words, (key, _) in made.items()}


def test_up_with_keys_asks_for_one(keys: tuple[str, dict[str, str]], deployment: Callable[..., str]) -> None:
    """The command ``up`` names at once the scopes that its own key lacks."""
    file, made = keys
    for key, word in (("", "UNAUTHENTICATED"), (made["--scope infer"], "PERMISSION_DENIED")):
        environment = {"LORAMUX_KEYS_FILE": file, "LORAMUX_API_KEY": key}
        ended = CliRunner().invoke(app, ["up", deployment("tiny", "lora1")], env=environment)
        assert ended.exit_code == 4
        assert ended.stderr.startswith(f"error: {word}: ")
        assert f"loramux keys new {BOTH}" in ended.stderr


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.sweep), signal.SIGINT])
def test_up_serves_until_a_signal(
    scripted: dict[str, str],
    keys: tuple[str, dict[str, str]],
    tmp_path: Path,
    deployment: Callable[..., str],
    number: signal.Signals,
) -> None:
    """``up`` with a key builds, serves and prints examples; a signal ends it after the open stream."""
    scripted |= {"LORAMUX_KEYS_FILE": keys[0], "LORAMUX_API_KEY": keys[1][BOTH]}
    with start_command(tmp_path, "up", deployment("tiny", "lora1", "lora2"), **scripted) as command:
        text = command.read_until("InferenceService/Generate")
        assert "lora1    -     8, 16" in text
        assert "models     base, lora1, lora2" in text
        assert "loramux chat lora2" in text
        found = re.search(r"inference +(\S+)", text)
        assert found
        children = family(command)
        with Client(found[1]) as client:
            events = client.generate("lora1", "slow")
            next(events)
            command.process.send_signal(number)
            assert len([event for event in events if isinstance(event, Delta)]) == 5
        assert command.end() == 0
        assert_gone(children)


def test_run_serves_a_base_without_a_file(scripted: dict[str, str], tmp_path: Path) -> None:
    """``run`` builds and serves as ``up`` does, and writes the file that ``up`` takes."""
    for name in ("tiny", "lora1", "lora2"):
        (tmp_path / name).mkdir()
    words = ("run", "./tiny", "--adapter", "lora1=./lora1", "-a", "lora2=./lora2", "--save", "saved.yaml")
    for command_words in (words, ("up", "saved.yaml")):
        with start_command(tmp_path, *command_words, **scripted) as command:
            text = command.read_until("InferenceService/Generate")
            assert "deployment tiny: generation" in text
            assert "models     base, lora1, lora2" in text
            assert command.end(signal.SIGINT) == 0


def test_up_for_machines_killed_kills_its_children(
    scripted: dict[str, str], tmp_path: Path, deployment: Callable[..., str]
) -> None:
    """``up --json`` prints one document once all is up, and nothing before; ``kill -9`` ends both services."""
    with start_command(tmp_path, "up", deployment("json", "lora1"), "--json", **scripted) as command:
        found = json.loads(command.read_until("}\n"))
        assert found["models"] == ["base", "lora1", "lora2"]
        assert set(found) == {"schema", "inference", "http", "builder", "models", "logs"}
        children = family(command)
        command.process.kill()
        assert_gone(children)


def test_interrupted_before_it_is_ready(
    scripted: dict[str, str], tmp_path: Path, deployment: Callable[..., str]
) -> None:
    """Ctrl-C while a service still loads ends everything with exit 130."""
    with start_command(tmp_path, "up", deployment("hang", "lora1"), **scripted) as command:
        command.read_until("is published")
        children = family(command)
        assert command.end(signal.SIGINT) == 130
        assert_gone(children)


def test_become_runs_the_service(scripted: dict[str, str], tmp_path: Path) -> None:
    """``loramux builder`` becomes the service: the same process, so that signals reach it."""
    address = free_address("127.0.0.1:0")
    with start_command(tmp_path, "builder", "--grpc", address, **scripted) as command:
        waited = CliRunner().invoke(app, ["health", address, "--wait", f"{BOUND_S}"])
        assert waited.exit_code == 0, command.errors
        assert psutil.Process(command.process.pid).cmdline()[1:4] == ["-P", "-m", "builder_service"]
        assert command.end(signal.SIGTERM) == 0


def on_a_terminal(
    args: Sequence[str], environment: dict[str, str], dialogue: Sequence[tuple[str, bytes]]
) -> str:
    """Run ``loramux`` on a terminal of 80x24; when a text of the dialogue stands there, type its keys."""
    terminal, own = pty.openpty()
    size = {"COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
    folder = Path(environment["XDG_STATE_HOME"])
    process = command_line(args, [own] * 3, folder, environment | size)
    os.close(own)
    written, read, left = b"", 0, list(dialogue)
    try:
        while True:
            assert select.select([terminal], [], [], BOUND_S)[0], (left, written.decode())
            try:
                written += os.read(terminal, 65536)
            except OSError:  # what Linux calls the end of a terminal
                break
            if left and left[0][0].encode() in written[read:]:
                read = len(written)
                os.write(terminal, left.pop(0)[1])
        assert process.wait() == 0, written.decode()
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode())


def test_the_demo_on_a_terminal(
    tmp_path: Path, scripted: dict[str, str], deployment: Callable[..., str]
) -> None:
    """The demo shows bars, the table, panels side by side and the next steps, within the terminal's width."""
    deployment("demo", "lora1", "lora2")
    text = on_a_terminal(["demo", "--examples", str(tmp_path), "--prompt", "hello"], scripted, [])
    assert "✓ builder service on 127.0.0.1" in text
    assert re.search(r"lora2 +done +━+ +5\.2 MB", text)
    assert re.search(r"╭─ base · base ─+╮╭─ lora1 · rank 8 ─+╮", text)
    assert "│ the grey sea sings (1)" in text
    assert "3 streams in one batch: 15 tokens" in text
    assert "loramux demo --keep" in text
    panels = [line.strip() for line in text.splitlines() if line.startswith(("│", "╭", "╰"))]
    assert max(map(len, panels)) <= 80


def _changed(builder: str, *words: str | Path) -> int:
    """Run a command that changes the deployment, in this process; return the generation that it names."""
    ended = CliRunner().invoke(app, [*map(str, words), "--builder", builder, "--json"])
    assert ended.exit_code == 0, ended.stderr
    return int(re.findall(r'"generation": ?([0-9]+)', ended.stdout)[-1])


def test_what_is_changed_is_served_without_a_restart(tmp_path: Path) -> None:
    """Pushes, removals and rollbacks hold for the next request; an older stream finishes with its adapter."""
    world = make_world(tmp_path)
    file = tmp_path / "deployment.yaml"
    file.write_text(json.dumps(world.deployment().model_dump(mode="json")))
    with (
        run_up(tmp_path, file, "--dtype", "float32", "--threads", "1") as served,
        Client(served.grpc) as client,
    ):
        builder = served.builder
        output = (tmp_path / "up.log").read_text()
        doing = r"  importing torch\n  reading the base, .* GB\n  loading [0-9]+ adapters\n"
        assert re.search(doing, re.sub(r"  (compiling|trying out) operations .*\n", "", output)), output

        def ask(model: str, generation: int) -> Started:
            events = list(client.generate(model, "HELLO", max_tokens=4, min_generation=generation))
            assert isinstance(events[0], Started)
            assert isinstance(events[-1], Finished)
            return events[0]

        wide = ask("wide", 1)
        answer = client.generate("wide", "HELLO", max_tokens=200, ignore_eos=True)
        assert isinstance(next(answer), Started)
        pushed = _changed(builder, "push", world.adapters["rs"], "--name", "wide")
        changed = ask("wide", pushed)
        assert changed.generation == pushed > wide.generation
        assert changed.adapter_digest == ask("rs", pushed).adapter_digest != wide.adapter_digest
        assert isinstance(list(answer)[-1], Finished)
        removed = _changed(builder, "remove", "all")
        with pytest.raises(ModelNotFound):
            ask("all", removed)
        with Client(builder=builder) as operator:
            back = operator.rollback("tiny", wide.generation).generation
        assert ask("wide", back).adapter_digest == wide.adapter_digest
        ask("all", back)
