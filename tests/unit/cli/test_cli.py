"""The command line against scripted services: output and exit status."""

import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from loramux.cli.build_view import WORK, fraction_done
from loramux.cli.local import services
from loramux.cli.local.tree import important, tail
from loramux.cli.main import usual
from loramux.cli.shell import modules, printable
from loramux.cli.tables import kind, task
from loramux.records import AdapterInfo, Stage
from tests.support.cases import cases
from tests.support.commands import run
from tests.support.fake_services import Fakes, deployment_text
from tests.support.https_server import served


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str) -> None:
    code, text, _ = run(flag)
    assert code == 0
    assert re.fullmatch(r"loramux \d+\.\d+\.\d+\n", text)


@pytest.mark.parametrize(("typed", "meant"), cases(__file__, "test_what_people_type_otherwise"))
def test_what_people_type_otherwise(typed: list[str], meant: list[str]) -> None:
    """``help`` is a command too, the key may follow a command, and text after ``--`` is no flag."""
    assert usual(typed) == meant


def test_an_http_api_where_grpc_was_meant() -> None:
    """A server of HTTP/1 behind ``--grpc``, and an address with http://, are recognised."""
    with served(ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)) as address:
        code, _, errors = run("models", "--grpc", address)
        assert code == 3
        assert f"no answer from {address}: it does not speak gRPC. If that is the HTTP port" in errors
        code, _, errors = run("health", f"http://{address}")
        assert code == 2
        assert "expected HOST:PORT of a gRPC server" in errors


def test_an_address_without_a_port() -> None:
    """A host alone is a mistake of the command line; gRPC would take it for port 443."""
    code, _, errors = run("models", "--grpc", "127.0.0.1")
    assert code == 2
    assert "error: SETTINGS_INVALID: 127.0.0.1: expected HOST:PORT" in errors


def test_a_misspelt_key_is_named(tmp_path: Path) -> None:
    """A deployment file with a wrong key fails with its name and the nearest known one, without a traceback."""
    path = tmp_path / "d.yaml"
    path.write_text(deployment_text("m", "a").replace("checkpoint_repository", "chekpoint_repository"))
    code, _, errors = run("build", str(path))
    assert code == 1
    assert errors.startswith("error: DEPLOYMENT_INVALID: ")
    assert "Did you mean checkpoint_repository?" in errors
    assert "Traceback" not in errors


def test_no_server_is_one_line() -> None:
    code, _, errors = run("models", "--grpc", "127.0.0.1:1")
    assert code == 3
    assert re.fullmatch(r"error: SERVER_UNAVAILABLE: no answer from 127\.0\.0\.1:1: .*\n", errors)


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
    code, text, _ = run("models", "--grpc", fakes.inference_address)
    assert code == 0
    assert [re.split(r"\s{2,}", line)[:4] for line in text.splitlines()[1:]] == [
        ["base", "-", "-", "-"],
        ["lora1", "base", "LoRA, head (5 rows)", "8"],
        ["lora2", "base", "LoRA, head (5 rows)", "16"],
    ]


def test_a_kind_that_is_not_known_here_is_told_as_it_is() -> None:
    """A newer service may have words that this command does not."""
    assert kind(("lora", "spline", "embedding"), {"embedding": 2}) == "LoRA, spline, embedding (2 rows)"
    assert kind(()) == ""


def test_who_generates_no_text_is_told_what_it_is_asked_for() -> None:
    """Labels are listed by name, as many as fit a line; an adapter that generates has no such line."""
    assert kind(("lora", "classifier"), num_labels=2) == "LoRA, classifier (2 labels)"
    assert task(("lora", "classifier"), ["spam", "ham"]) == "scores texts, and generates none: spam, ham"
    stated = task(("classifier",), [f"l{number}" for number in range(1024)], "regression")
    assert stated.startswith("scores texts, and generates none (regression): l0, l1, ")
    assert stated.endswith(" and 1004 more")
    assert task(("lora", "encoder")) == "makes vectors of texts, and generates none"
    assert task(("lora",)) == ""


def test_health(fakes: Fakes) -> None:
    assert run("health", fakes.builder_address) == (0, "SERVING\n", "")
    service = "loramux.inference.v1.InferenceService"
    assert run("health", fakes.inference_address, "--service", service)[0] == 0
    assert run("health", "127.0.0.1:1", "--wait", "0.3")[0] == 3
    assert "[default: 127.0.0.1:50052]" in run("health", "--help")[1]


def test_a_missing_extra_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(services.NEEDS, "inference", ("numpy", "no_such_package"))
    code, _, errors = run("serve", "--deployment", "m")
    assert code == 2
    assert "needs no_such_package, not installed here: pip install 'loramux[inference]'" in errors


def test_service_commands() -> None:
    """The service gets only the flags that were set, with folders as absolute paths."""
    assert services.builder_command(None, None, [])[1:] == ["-m", "builder_service"]
    engine = {"backend": "torch", "dtype": None, "threads": 2}
    command = services.inference_command("m", "s3://b/p", "127.0.0.1:0", [Path("/a/../b")], engine)
    assert command[3:] == [
        *("--deployment", "m", "--store", "s3://b/p", "--grpc", "127.0.0.1:0"),
        *("--backend", "torch", "--threads", "2", "--local-root", "/b"),
    ]


def test_progress_never_falls() -> None:

    def at(stage: Stage, done: int = 0) -> float:
        return fraction_done(AdapterInfo("a", stage, done, 10, "", (), (), 0, 0, (), False))

    order = [Stage.WAITING, *WORK, Stage.DONE]
    values = [at(stage, done) for stage in order for done in (0, 5, 10)]
    assert values == sorted(values)
    assert (values[0], values[-1]) == (0.0, 1.0)


def test_module_names_are_folded() -> None:
    assert modules(("attn_q", "attn_v", "mlp_h_to_4h")) == "attn q v, mlp h_to_4h"
    assert modules(()) == "-"


def test_control_characters_do_not_reach_the_terminal() -> None:
    """Text of a model cannot move the cursor or change the title."""
    assert printable("a\x1b]0;title\x07b\r\n\tc\x9b2J") == "a]0;titleb\n\tc2J"


@pytest.mark.parametrize(("line", "expected"), cases(__file__, "test_log_lines_that_matter"))
def test_log_lines_that_matter(line: str, expected: str) -> None:
    """Warnings and errors of a child are shown, but those that the command reports itself."""
    assert important(line) == expected


def test_the_last_lines_of_a_service_that_died(tmp_path: Path) -> None:
    request, slow = '{"level": "info", "event": "answered"}', '{"level": "error", "event": "broken"}'
    log = tmp_path / "log"
    log.write_text("\n".join([slow, "Traceback", *[request] * 20]))
    assert tail(log) == [slow, "Traceback"]


def test_up_with_a_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A backend whose package is missing is refused before anything is built, as a wrong setting is."""
    (tmp_path / "deployment.yaml").write_text(deployment_text("tiny", "lora1"))
    monkeypatch.setattr("loramux_shared.settings.find_spec", lambda _: None)
    code, _, errors = run("up", str(tmp_path / "deployment.yaml"), "--backend", "triton")
    assert code == 2
    assert "SETTINGS_INVALID: LORAMUX_BACKEND=triton needs Triton: pip install 'loramux[gpu]'" in errors
