"""The command line as processes: what runs, on what terminal, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from loramux import Client, Delta
from loramux.cli.exits import Exit, exit_of
from loramux.cli.main import app
from loramux.cli.tree import ProcessTree, ServiceDied, free_address, run_tree
from loramux.faults import SettingsInvalid
from loramux_shared.rpc.listening import require_free
from tests.support.fake_services import Fakes
from tests.support.once import one_at_a_time
from tests.support.root import ROOT

PROGRAM = [sys.executable, "-c", "from loramux.cli.main import main; main()"]
DEADLINE_S = 20.0
Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def environment(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An environment in which ``python -m builder_service`` and its peer are the scripted ones.

    Commands take the usual ports where these are free, and two that look at the same moment find them so.
    """
    for kind in ("builder", "inference"):
        package = tmp_path / "fakes" / f"{kind}_service"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(f"from tests.support.fake_services import main; main({kind!r})\n")
    path = os.pathsep.join(map(str, (tmp_path / "fakes", ROOT, ROOT / "shared")))
    with one_at_a_time(tmp_path_factory, "usual-ports"):
        yield {
            **os.environ,
            "PYTHONPATH": path,
            "TMPDIR": str(tmp_path),
            "COLUMNS": "80",
            "XDG_STATE_HOME": str(tmp_path),
        }


@pytest.fixture
def launch(tmp_path: Path, environment: dict[str, str]) -> Iterator[Launch]:
    """Starts ``loramux`` as a process, and kills what a failed test leaves of it."""
    started: list[subprocess.Popen[str]] = []

    def start(*args: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*PROGRAM, *args],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], wanted: str) -> str:
    """Read stdout up to the line that holds the wanted text."""
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if wanted in line:
            return "".join(lines)
    raise AssertionError(f"{wanted!r} never came; stderr: {process.stderr and process.stderr.read()}")


def family(process: subprocess.Popen[str], size: int = 2) -> list[psutil.Process]:
    """Return the children of a running tree."""
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == size
    return children


def assert_gone(processes: Sequence[psutil.Process]) -> None:
    """Wait until none of the processes runs."""
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]


def test_a_taken_port_is_replaced() -> None:
    """An address is kept while it is free."""
    first = free_address("127.0.0.1:0")
    assert free_address(first) == first


def test_a_child_that_dies_ends_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that ends unasked stops the others, and its last lines are in the fault."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the log outlives the failure
    others: list[int] = []

    async def work(tree: ProcessTree) -> None:
        other = await tree.start("other", [sys.executable, "-c", "import time; time.sleep(60)"])
        others.append(other.process.pid)
        await tree.start("weak", [sys.executable, "-c", "print('out of memory'); raise SystemExit(3)"])
        await asyncio.Event().wait()

    with pytest.raises(ServiceDied, match="weak ended with exit status 3") as caught:
        run_tree(work)
    assert str(caught.value).endswith("| out of memory")
    assert not psutil.pid_exists(others[0])


def test_a_failure_beside_children_stops_them() -> None:
    """When the work itself fails, its fault comes out and no child is left."""
    pids: list[int] = []

    async def work(tree: ProcessTree) -> None:
        child = await tree.start("other", [sys.executable, "-c", "import time; time.sleep(60)"])
        pids.append(child.process.pid)
        raise SettingsInvalid("wrong")

    with pytest.raises(SettingsInvalid, match="wrong"):
        run_tree(work)
    assert not psutil.pid_exists(pids[0])


def test_a_child_is_ready_when_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting ends with the child's own word, however long the path of the temporary folder is."""
    deep = tmp_path / ("deep" * 30)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    said: list[str] = []

    async def work(tree: ProcessTree) -> None:
        program = (
            "import time; from loramux_shared.notify import notify, READY; time.sleep(0.2); "
            "print('up', flush=True); "
            "notify('STATUS=nearly'); notify(READY); time.sleep(60)"
        )
        await tree.serve("child", [sys.executable, "-c", program])
        said.append((tree.folder / "child.log").read_text())

    run_tree(work)
    assert said == ["up\n"]


def test_a_child_names_the_failure_that_ends_it() -> None:
    """The reason that a service ends with is the tree's, with all its lines, and so is the exit code."""
    words = "noise\nbuilder_service: SETTINGS_INVALID: cannot listen.\n  E_BAD_FIELD grpc: found x\nmore noise"

    async def work(tree: ProcessTree) -> None:
        await tree.serve("builder", [sys.executable, "-c", f"import sys; print({words!r}); sys.exit(2)"])

    with pytest.raises(SettingsInvalid) as caught:
        run_tree(work)
    assert str(caught.value) == "builder: cannot listen.\n  E_BAD_FIELD grpc: found x"
    assert exit_of(caught.value) is Exit.USAGE


@pytest.mark.parametrize("address", ["unix:/somewhere/door", "127.0.0.1:0", "localhost:0"])
def test_every_form_of_an_address_may_be_free(address: str) -> None:
    """What a service can listen on is not refused for its form."""
    require_free(address)


@pytest.mark.parametrize("flag", ["--grpc", "--http", "--builder"])
def test_up_on_a_taken_address(fakes: Fakes, deployment: Callable[..., str], flag: str) -> None:
    """Where something listens already, ``up`` says so before it starts anything."""
    args = ["up", deployment("tiny", "lora1"), flag, fakes.inference_address, "--json"]
    ended = CliRunner().invoke(app, args)
    assert ended.exit_code == 2
    assert [json.loads(line)["error"]["reason"] for line in ended.stdout.splitlines()] == ["SETTINGS_INVALID"]
    assert f"cannot listen on '{fakes.inference_address}' (Address already in use)" in ended.stderr
    assert "service on" not in ended.stderr


def test_up_with_a_wrong_setting(deployment: Callable[..., str]) -> None:
    """A value that the inference service would refuse after the build is refused before it, in one line."""
    ended = CliRunner().invoke(app, ["up", deployment("tiny", "lora1"), "--dtype", "bf16"])
    assert ended.exit_code == 2
    [line] = ended.stderr.splitlines()
    assert "SETTINGS_INVALID: --dtype=bf16: expected 'auto', 'float32', 'bfloat16' or 'float16'" in line


def test_up_with_keys_needs_one_itself(
    launch: Launch,
    environment: dict[str, str],
    tmp_path: Path,
    deployment: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the services will ask for keys, ``up`` says at once which it needs; with that it goes on."""
    keys = tmp_path / "keys.jsonl"
    made = {
        scope: CliRunner().invoke(app, ["keys", "new", "--file", str(keys), *scope.split()]).stdout.strip()
        for scope in ("--scope infer", "--scope build --scope infer")
    }
    monkeypatch.setenv("LORAMUX_KEYS_FILE", str(keys))
    for key, code, word in (("", 4, "UNAUTHENTICATED"), (made["--scope infer"], 4, "PERMISSION_DENIED")):
        monkeypatch.setenv("LORAMUX_API_KEY", key)
        ended = CliRunner().invoke(app, ["up", deployment("tiny", "lora1")])
        assert ended.exit_code == code
        assert ended.stderr.startswith(f"error: {word}: ")
        assert "loramux keys new --scope build --scope infer" in ended.stderr
    environment |= {"LORAMUX_KEYS_FILE": str(keys), "LORAMUX_API_KEY": made["--scope build --scope infer"]}
    process = launch("up", deployment("tiny", "lora1"))
    read_until(process, "InferenceService/Generate")
    children = family(process)
    process.terminate()
    assert process.wait(DEADLINE_S) == 0
    assert_gone(children)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.sweep), signal.SIGINT])
def test_up_serves_until_a_signal(
    launch: Launch, deployment: Callable[..., str], number: signal.Signals
) -> None:
    """``up`` builds, serves, says what to try; a signal lets an open stream finish, and nothing is left."""
    process = launch("up", deployment("tiny", "lora1", "lora2"))
    text = read_until(process, "InferenceService/Generate")
    assert "lora1    -     8, 16" in text
    assert "models     base, lora1, lora2" in text
    assert "loramux chat lora2" in text
    found = re.search(r"inference +(\S+)", text)
    assert found
    children = family(process)
    with Client(found[1]) as client:
        events = client.generate("lora1", "slow")
        next(events)
        process.send_signal(number)
        assert len([event for event in events if isinstance(event, Delta)]) == 5
    assert process.wait(DEADLINE_S) == 0
    assert_gone(children)


def test_up_for_machines_killed_kills_its_children(launch: Launch, deployment: Callable[..., str]) -> None:
    """``up --json`` prints one document once all is up, and nothing before; ``kill -9`` ends both services."""
    process = launch("up", deployment("json", "lora1"), "--json")
    found = json.loads(read_until(process, "}"))
    assert found["models"] == ["base", "lora1", "lora2"]
    assert set(found) == {"schema", "inference", "http", "builder", "models", "logs"}
    children = family(process)
    process.kill()
    assert_gone(children)


def test_up_with_a_service_that_cannot_start(launch: Launch, deployment: Callable[..., str]) -> None:
    """A service that dies at the start ends ``up`` with its last lines and exit 1."""
    process = launch("up", deployment("crash"))
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "error: SERVICE_DIED: inference ended with exit status 1" in errors
    assert "| error: SETTINGS_INVALID: this machine is too small" in errors


def test_interrupted_before_it_is_ready(launch: Launch, deployment: Callable[..., str]) -> None:
    """Ctrl-C while a service still loads ends everything with exit 130."""
    process = launch("up", deployment("hang", "lora1"))
    read_until(process, "is published")
    end = time.monotonic() + DEADLINE_S
    while len(children := psutil.Process(process.pid).children(recursive=True)) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE_S) == 130
    assert_gone(children)


def test_become_runs_the_service(launch: Launch, environment: dict[str, str]) -> None:
    """``loramux builder`` becomes the service: the same process, so that signals reach it."""
    address = free_address("127.0.0.1:0")
    process = launch("builder", "--grpc", address)
    assert CliRunner().invoke(app, ["health", address, "--wait", "10"]).exit_code == 0
    assert psutil.Process(process.pid).cmdline()[1:3] == ["-m", "builder_service"]
    process.terminate()
    assert process.wait(DEADLINE_S) == 0


def on_a_terminal(
    args: Sequence[str], environment: dict[str, str], dialogue: Sequence[tuple[str, bytes]]
) -> str:
    """Run ``loramux`` on a terminal of 80x24; when a text of the dialogue stands there, type its keys."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(environment["TMPDIR"])
        size = {"COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
        os.execve(PROGRAM[0], [*PROGRAM, *args], {**environment, **size})  # noqa: S606
    written, read, left = b"", 0, list(dialogue)
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        if left and left[0][0].encode() in written[read:]:
            read = len(written)
            os.write(terminal, left.pop(0)[1])
        if not select.select([terminal], [], [], 0.1)[0]:
            continue
        try:
            written += os.read(terminal, 65536)
        except OSError:  # what Linux calls the end of a terminal
            break
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, written.decode()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode())


def test_the_demo_on_a_terminal(
    tmp_path: Path, environment: dict[str, str], deployment: Callable[..., str]
) -> None:
    """The demo shows bars, the table, panels side by side and lines to try, within the terminal's width."""
    deployment("demo", "lora1", "lora2")
    text = on_a_terminal(["demo", "--examples", str(tmp_path), "--prompt", "hello"], environment, [])
    assert "✓ builder service on 127.0.0.1" in text
    assert re.search(r"lora2 +done +━+ +5\.2 MB", text)
    assert re.search(r"╭─ base · base ─+╮╭─ lora1 · rank 8 ─+╮", text)
    assert "│ the grey sea sings (1)" in text
    assert "3 streams in one batch: 15 tokens" in text
    assert "loramux demo --keep" in text
    panels = [line.strip() for line in text.splitlines() if line.startswith(("│", "╭", "╰"))]
    assert max(map(len, panels)) <= 80


def test_a_conversation(fakes: Fakes, environment: dict[str, str]) -> None:
    """A chat keeps its history, forgets it, changes the model, survives a wrong one, and leaves at Ctrl-D."""
    lines = (b"one", b"two", b"/clear", b"three", b"/model lora2", b"/model lora22", b"/help", b"/modle x")
    dialogue = [("> ", line + b"\n") for line in lines]
    args = ["chat", "lora1", "--grpc", fakes.inference_address]
    text = on_a_terminal(args, environment, [*dialogue, ("> ", b"\x04")])
    assert re.findall(r"sings \((\d)\)", text) == ["1", "3", "1"]
    assert "lora2> " in text
    assert "error: MODEL_NOT_FOUND: no model 'lora22'; served are base, lora1, lora2." in text
    assert "no command /modle" in text
    typed = (Path(environment["XDG_STATE_HOME"]) / "loramux/chat_history").read_text()
    assert "two\n" in typed


def test_a_system_message_and_the_keys(fakes: Fakes, environment: dict[str, str]) -> None:
    """``/system`` stays over ``/clear``; TAB completes names; the arrow finds earlier lines."""
    lines = (b"/system be brief", b"one", b"/clear", b"\x1b[A\x1b[A", b"/model lo\t1", b"two", b"/models")
    dialogue = [("> ", line + b"\n") for line in lines]
    args = ["chat", "base", "--grpc", fakes.inference_address]
    text = on_a_terminal(args, environment, [*dialogue, ("> ", b"/quit\n")])
    said = [[turn.content for turn in request.messages.messages] for request in fakes.inference.requests[-3:]]
    assert said[:2] == [["be brief", "one"], ["be brief", "one"]]
    assert said[2][::3] == ["be brief", "two"]
    assert "* lora1" in text


def test_stopping_an_answer(fakes: Fakes, environment: dict[str, str]) -> None:
    """Ctrl-C stops an answer, which frees it on the server, and the conversation goes on."""
    fakes.inference.cancelled.clear()
    dialogue = [("> ", b"wait\n"), ("the ", b"\x03"), ("> ", b"hello\n"), ("> ", b"/quit\n")]
    args = ["chat", "lora1", "--grpc", fakes.inference_address]
    text = on_a_terminal(args, environment, dialogue)
    assert "stopped" in text
    assert "sings (3)" in text
    assert fakes.inference.cancelled.is_set()
