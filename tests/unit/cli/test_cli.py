"""The command line against scripted services: output, documents of ``--json``, and exit status."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest

from loramux.cli.build_view import BuildLines
from loramux.cli.documents import jsonable
from loramux.cli.exits import Exit, exit_of, state_dir, tell_uncaught, tell_unraisable
from loramux.cli.local import services
from loramux.cli.local.tree import important
from loramux.cli.main import usual
from loramux.cli.shell import printable
from loramux.cli.tables import kind, task
from loramux.records import Stage
from loramux_shared import faults, process
from loramux_shared.faults import Fault
from loramux_shared.rpc.status import CallFailed
from tests.support.cases import cases
from tests.support.http_server import serve_http
from tests.support.processes.commands import run
from tests.support.processes.forks import command_line
from tests.support.root import ROOT
from tests.support.services.fake_grpc import Fakes, deployment_text
from tests.unit.cli.test_build_view import adapter, state


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str) -> None:
    """The version is one line of three numbers."""
    code, text, _ = run(flag)
    assert code == 0
    assert re.fullmatch(r"loramux \d+\.\d+\.\d+\n", text)


@pytest.mark.parametrize(("typed", "meant"), cases(__file__, "test_what_people_type_otherwise"))
def test_what_people_type_otherwise(typed: list[str], meant: list[str]) -> None:
    """``help`` is a command too, the key may follow a command, and text after ``--`` is no flag."""
    assert usual(typed) == meant


def test_an_http_api_where_grpc_was_meant() -> None:
    """A server of HTTP/1 behind ``--grpc``, and an address with http://, are recognised."""
    with serve_http(ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)) as address:
        code, _, errors = run("models", "--grpc", address)
        assert code == 3
        assert f"no answer from {address}: it does not speak gRPC. If that is the HTTP port" in errors
        code, _, errors = run("health", f"http://{address}")
        assert code == 2
        assert "expected HOST:PORT of a gRPC server" in errors


def test_build_tells_results_and_shows_a_table(fakes: Fakes, deployment: Callable[..., str]) -> None:
    """Elsewhere than on a terminal a build is plain lines: results on stderr, the table on stdout."""
    path = Path(deployment("plain", "lora1", "lora2"))
    path.write_text("resources: {}\n" + path.read_text())
    code, text, errors = run("build", str(path), "--builder", fakes.builder_address)
    assert code == 0
    assert errors.count("resources") == 1
    assert errors.count("lora2: ") == errors.count("lora2: done\n") == 1
    assert "rounded (W_NARROWED): lora1" in errors
    header, first, *_, last = text.splitlines()
    assert header.split() == ["adapter", "kind", "rank", "modules", "tensors", "bytes", "digest", "warnings"]
    assert re.split(r"\s{2,}", first) == [
        *("lora1", "-", "8, 16", "attn q v, mlp gate", "120", "5.2 MB", "0123456789ab", "W_NARROWED")
    ]
    assert last == "deployment plain: generation 3 is published"


def test_models_are_a_table(fakes: Fakes) -> None:
    """`models` prints a row for every model with its parent, its parts and its rank."""
    code, text, _ = run("models", "--grpc", fakes.inference_address)
    assert code == 0
    assert [re.split(r"\s{2,}", line)[:4] for line in text.splitlines()[1:]] == [
        ["base", "-", "-", "-"],
        ["lora1", "base", "LoRA, head (5 rows)", "8"],
        ["lora2", "base", "LoRA, head (5 rows)", "16"],
    ]


def test_a_model_without_text_is_refused_with_what_it_serves() -> None:
    """Labels are listed by name as far as they fit a line; words of newer services are accepted."""
    assert kind(("lora", "spline", "embedding"), {"embedding": 2}) == "LoRA, spline, embedding (2 rows)"
    assert kind(()) == ""
    assert kind(("lora", "classifier"), num_labels=2) == "LoRA, classifier (2 labels)"
    assert task(("lora", "classifier"), ["spam", "ham"]) == "scores texts, and generates none: spam, ham"
    stated = task(("classifier",), [f"l{number}" for number in range(1024)], "regression")
    assert stated.startswith("scores texts, and generates none (regression): l0, l1, ")
    assert stated.endswith(" and 1004 more")
    assert (task(("lora", "encoder")), task(("lora",))) == ("makes vectors of texts, and generates none", "")


def test_health(fakes: Fakes) -> None:
    """`health` prints the status of a service, and exits with 3 where none answers in time."""
    assert run("health", fakes.builder_address) == (0, "SERVING\n", "")
    [document] = documents("health", fakes.builder_address)
    assert (document["status"], document["address"]) == ("SERVING", fakes.builder_address)
    service = "loramux.inference.v1.InferenceService"
    assert run("health", fakes.inference_address, "--service", service)[0] == 0
    assert run("health", "127.0.0.1:1", "--wait", "0.3")[0] == 3
    assert "[default: 127.0.0.1:50052]" in run("health", "--help")[1]


def test_a_missing_extra_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command without its packages names one, and the extra that installs it."""
    monkeypatch.setitem(services.NEEDS, "inference", ("numpy", "no_such_package"))
    code, _, errors = run("serve", "--deployment", "m")
    assert code == 2
    assert "needs no_such_package, not installed here: pip install 'loramux[inference]'" in errors
    monkeypatch.setitem(services.NEEDS, "builder", ("no_such_package",))
    assert "pip install 'loramux[builder]'" in run("builder")[2]
    assert "pip install 'loramux[check]'" in run("check", str(ROOT), "--base", str(ROOT))[2]


def test_service_commands() -> None:
    """The service gets only the flags that were set, with folders as absolute paths."""
    assert services.builder_command(None, None, [])[1:] == ["-P", "-m", "builder_service"]
    engine = {"backend": "torch", "dtype": None, "threads": 2}
    command = services.inference_command("m", "s3://b/p", "127.0.0.1:0", [Path("/a/../b")], engine)
    assert command[4:] == [
        *("--deployment", "m", "--store", "s3://b/p", "--grpc", "127.0.0.1:0"),
        *("--backend", "torch", "--threads", "2", "--local-root", "/b"),
    ]


def test_a_child_imports_nothing_of_the_working_directory(tmp_path: Path) -> None:
    """A module there of a name that Python or a package has would be run; no other way starts a child."""
    (tmp_path / "timeit.py").write_text("raise SystemExit(7)")
    child = process.python("timeit", "-n1", "-r1")
    assert subprocess.run(child, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    folders = ("loramux", "shared", "builder_service", "inference_service", "extensions")
    sources = [
        path for folder in folders for path in (ROOT / folder).rglob("*.py") if "tests" not in path.parts
    ]
    assert not [path for path in sources if 'sys.executable, "-m"' in path.read_text()]


def test_control_characters_do_not_reach_the_terminal() -> None:
    """Text of a model cannot move the cursor or change the title."""
    assert printable("a\x1b]0;title\x07b\r\n\tc\x9b2J") == "a]0;titleb\n\tc2J"


@pytest.mark.parametrize(("line", "expected"), cases(__file__, "test_log_lines_that_matter"))
def test_log_lines_that_matter(line: str, expected: str) -> None:
    """Warnings and errors of a child are shown, but those that the command reports itself."""
    assert important(line) == expected


def test_up_with_a_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A backend whose package is missing is refused before anything is built, as a wrong setting is."""
    (tmp_path / "deployment.yaml").write_text(deployment_text("tiny", "lora1"))
    monkeypatch.setattr("loramux_shared.settings.find_spec", lambda _: None)
    code, _, errors = run("up", str(tmp_path / "deployment.yaml"), "--backend", "triton")
    assert code == 2
    assert "SETTINGS_INVALID: LORAMUX_BACKEND=triton needs Triton: pip install 'loramux[gpu]'" in errors


def documents(*args: str, code: int = 0) -> list[Any]:
    """Run a command with ``--json`` and return the documents on stdout, one per line or one in all."""
    status, text, errors = run(*args, "--json")
    assert status == code, errors
    return [json.loads(text)] if text.startswith("{\n") else [json.loads(line) for line in text.splitlines()]


def test_lines_of_a_build_grow_with_what_happens(capsys: pytest.CaptureFixture[str]) -> None:
    """All adapters at the beginning and at the end, between them those that changed; nothing without news."""
    count = 20
    adapters = [adapter(number, Stage.WAITING) for number in range(count)]
    lines = BuildLines()
    states = [list(adapters)]
    for number in range(count):
        for stage in (Stage.FETCHING, Stage.DONE):
            adapters[number] = adapter(number, stage)
            states.append(list(adapters))
    for found in states:
        for _ in range(2):  # the second time, copies that are equal
            lines.tell(state([replace(each) for each in found]))
    lines.tell(state(adapters, ended=True))
    output = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(line["deployment"]["adapters"]) for line in output] == [count, *[1] * (2 * count), count]
    merged: dict[str, Any] = {}
    for line, found in zip(output, [*states, adapters], strict=True):
        merged |= {each["name"]: each for each in line["deployment"]["adapters"]}
        assert list(merged.values()) == jsonable(found)
        assert sum(line["stages"].values()) == count
    assert output[-1]["stages"] == {"done": count}


def test_a_refused_build_ends_with_its_failure(fakes: Fakes, deployment: Callable[..., str]) -> None:
    """The last line holds the reason and the findings, and the exit code is that of people."""
    path = deployment("refused", "bad")
    *_, state, failed = documents("build", path, "--builder", fakes.builder_address, code=1)
    assert state["deployment"]["failure"]["reason"] == "ADAPTER_INVALID"
    assert failed["error"]["reason"] == "ADAPTER_INVALID"
    assert [finding["code"] for finding in failed["error"]["findings"]] == ["E_RANK_MAX", "E_SHAPE"]


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        *((getattr(faults, name)("no"), Exit[code]) for name, code in cases(__file__, "test_exit_codes")),
        (CallFailed("strange", grpc.StatusCode.UNKNOWN), Exit.FAILED),
    ],
)
def test_exit_codes(fault: Fault, code: Exit) -> None:
    """Faults that a retry can cure, faults of rights and other faults have different exit codes."""
    assert exit_of(fault) is code


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_reader_that_goes(fakes: Fakes, tmp_path: Path, flags: list[str]) -> None:
    """The command ends with 141 and no message when its reader closes the pipe, as ``| head`` does."""
    reading, writing = os.pipe()
    os.close(reading)
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        words = ["models", "--grpc", fakes.inference_address, *flags]
        process = command_line(words, [None, writing, file.fileno()], tmp_path, {})
    os.close(writing)
    assert (process.wait(), errors.read_text()) == (141, "")


def test_characters_that_the_output_does_not_have(tmp_path: Path) -> None:
    """A character that the encoding of stdout lacks is escaped instead of ending the command."""
    entry = {"id": "a", "sha256": "0" * 64, "scopes": ["infer"], "comment": "caf\xe9"}
    (tmp_path / "keys").write_text(json.dumps(entry))
    command = [sys.executable, "-m", "loramux.cli.main", "keys", "list", "--file", "keys"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    output = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True).stdout
    assert b"caf\\xe9" in output


def test_an_error_of_ours_is_one_line_and_a_file(tmp_path: Path, monkeypatch, capsys) -> None:
    """An unforeseen exception is one line that names the file with its traceback."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    error = ZeroDivisionError("one\nhalf")
    tell_uncaught(type(error), error, None)
    file = tmp_path / "loramux" / "traceback.txt"
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"error: INTERNAL: ZeroDivisionError: one half. Please report it with {file}."
    assert "ZeroDivisionError" in file.read_text()


@pytest.mark.parametrize(("made", "line"), [(False, ""), (True, "ValueError: not ours\n")])
def test_finalizers_after_ctrl_c_say_nothing(
    made: bool, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A call whose making was interrupted goes without a word; what other finalizers raise is printed."""

    class Call:
        state: bool

        def __del__(self) -> None:
            if self.state:
                raise ValueError("not ours")

    monkeypatch.setattr(sys, "unraisablehook", tell_unraisable)
    call = Call.__new__(Call)
    if made:
        call.state = True
    del call
    errors = capsys.readouterr().err
    assert errors.endswith(line)
    assert bool(errors) == made


def test_what_the_system_refuses_is_no_mistake_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk is an error with the file, without a request to report a bug."""
    error = OSError(28, "No space left on device", "/a/plot.png")
    group = ExceptionGroup("of tasks", [error] * 2)
    tell_uncaught(type(group), group, None)
    assert capsys.readouterr().err == "error: SYSTEM: No space left on device: /a/plot.png\n"


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """History and tracebacks are in a folder that no other user can enter."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = state_dir()
    assert (folder.parent, folder.stat().st_mode & 0o077) == (tmp_path, 0)
