"""Services that start while a dependency does not answer."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from inference_service.__main__ import serve
from loramux_shared.bundle.deployments import publish_generation
from loramux_shared.faults import SettingsInvalid
from loramux_shared.process import python
from loramux_shared.settings import InferenceSettings, load_settings
from loramux_shared.storage.open import open_store
from tests.support.generations import generation
from tests.support.processes.forks import Forked, builder_service, inference_service
from tests.support.waiting import BOUND_S, wait_until

SERVICES = {"inference_service": inference_service, "builder_service": builder_service}
WAITS = {"inference_service": "reading the deployment", "builder_service": "reading the journal"}
"""Event of the line that reports a wait for the store, by module."""


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that accepts connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    accepted.append(server.accept()[0])
                except OSError:  # closed
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for connection in accepted:
            connection.close()


@contextmanager
def started(module: str, endpoint: str, folder: Path) -> Iterator[tuple[Forked, Path]]:
    """Start a service on a store at an endpoint; yields its process and its log."""
    environment = {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "LORAMUX_LOG_FORMAT": "json",
        "LORAMUX_WORK_DIR": str(folder),
    }
    flags = ["--store", "s3://bucket/prefix", "--grpc", "127.0.0.1:0"]
    flags += ["--deployment", "tiny"] if module == "inference_service" else []
    log = folder / "log"
    log.touch()
    process = SERVICES[module](flags, log, os.environ | environment)
    try:
        yield process, log
    finally:
        process.kill()
        process.wait(BOUND_S)


def logged(process: Forked, log: Path, event: str) -> dict[str, str]:
    def found() -> list[dict[str, str]]:
        assert process.poll() is None, log.read_text()
        lines = [line for line in log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
        return [each for each in map(json.loads, lines) if each["event"] == event]

    return wait_until(found, event, log.read_text)[0]


@pytest.mark.parametrize(
    ("module", "number"),
    [
        ("inference_service", signal.SIGINT),
        ("builder_service", signal.SIGTERM),
        ("builder_service", signal.SIGINT),
    ],
)
def test_a_signal_ends_a_start_that_waits(
    silent: str, tmp_path: Path, module: str, number: signal.Signals
) -> None:
    """A waiting start names the store, and ends at once with the status of the signal."""
    with started(module, silent, tmp_path) as (process, log):
        assert logged(process, log, WAITS[module])["store"] == "s3://bucket/prefix"
        process.send_signal(number)
        assert process.wait(BOUND_S) == 128 + number


def test_a_signal_ends_a_start_that_imports_torch(tmp_path: Path) -> None:
    """A start whose imports take long ends at once."""
    store = f"file://{tmp_path}"
    publish_generation(open_store(store), generation())
    (tmp_path / "torch.py").write_text("import time; print('begun', flush=True); time.sleep(1e6)")
    command = python("inference_service", "--deployment", "tiny", "--store", store, "--grpc", "127.0.0.1:0")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == b"begun\n"
            process.terminate()
            assert process.wait(BOUND_S) == 128 + signal.SIGTERM
        finally:
            process.kill()


@pytest.mark.parametrize("api", ["grpc", "http"])
def test_a_taken_address_is_reported_before_anything_is_read(api: str, silent: str, tmp_path: Path) -> None:
    """A replica with a taken address fails at once, before it loads a model."""
    addresses = {"grpc": "127.0.0.1:0", api: silent.removeprefix("http://")}
    settings = load_settings(InferenceSettings, deployment="none", store=f"file://{tmp_path}", **addresses)
    with pytest.raises(
        SettingsInvalid, match=r"cannot listen on '127.* \(Address already in use\): expected a free"
    ):
        asyncio.run(serve(settings))


def test_a_deployment_that_is_not_there_is_reported_before_torch_is_imported(tmp_path: Path) -> None:
    """The deployment is read like settings: a refused process has imported nothing that takes seconds."""
    program = (
        "import sys; from inference_service.__main__ import main; status = main(); "
        "sys.exit(status if 'torch' not in sys.modules else 99)"
    )
    store = ["--store", f"file://{tmp_path}", "--grpc", "127.0.0.1:0"]
    for flags, status, stated in (
        (["--deployment", "none", *store], 1, "DEPLOYMENT_NOT_FOUND: no deployment 'none'"),
        (["--deployment", "none", *store, "--threads", "none"], 2, "SETTINGS_INVALID: --threads=none"),
    ):
        command = [sys.executable, "-c", program, *flags]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S, check=False)
        assert (ended.returncode, stated in ended.stderr) == (status, True), ended.stderr
