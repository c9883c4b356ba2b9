"""The inference service as a process with both APIs: its start line, a drain, its exit status."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from inference_service.core.sequence import Batch
from inference_service.engine.execution.runner import Pending, Runner
from inference_service.replica import BROKEN
from loramux import Client
from loramux.cli.exits import Exit
from loramux.cli.main import app
from loramux.faults import ReplicaFailed
from loramux_shared.storage.local import LocalStore
from tests.support.processes.forks import Forked, builder_service
from tests.support.processes.inference import run_inference
from tests.support.processes.watching import kill_at_end
from tests.support.s3_gateway import free_port
from tests.support.tiny import World, make_world
from tests.support.waiting import BOUND_S, wait_until

LONG = {"model": "rs", "prompt": [5, 6, 7], "max_tokens": 250, "n": 32, "stream": True}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("process"))
    world.build(LocalStore(world.root / "store"))
    return world


def test_all_apis_drain_together(world: World, tmp_path: Path) -> None:
    """After SIGTERM open streams of all APIs end, new requests are 503, and the exit status is 0."""
    with run_inference(world, tmp_path) as (process, ready), Client(ready["grpc"]) as client:
        url = f"http://{ready['http']}"
        assert [model["id"] for model in httpx.get(f"{url}/v1/models", timeout=BOUND_S).json()["data"]] == [
            "base",
            "all",
            "rs",
            "wide",
        ]
        events = client.generate("all", "HELLO", max_tokens=200, ignore_eos=True)
        next(events)
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=LONG | {"ignore_eos": True}, timeout=BOUND_S
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(process.pid, signal.SIGTERM)
            answer = wait_until(
                lambda: (
                    found if (found := httpx.get(f"{url}/health", timeout=BOUND_S)).status_code != 200 else None
                ),
                "the end of its health",
            )
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "shutting_down"
            *_, last = [line for line in lines if line]
        assert last == "data: [DONE]"
        assert list(events)[-1].usage.completion_tokens == 200
        assert process.wait() == 0


def hang_steps() -> None:
    """Let the steps of requests, not those of a start, wait for an event that never happens."""
    submit = Runner.submit

    def hanging(self: Runner, batch: Batch) -> Pending:
        if threading.current_thread().name == "engine":
            threading.Event().wait()
        return submit(self, batch)

    Runner.submit = hanging  # type: ignore[method-assign]


def test_a_step_that_hangs_ends_the_process(world: World, tmp_path: Path) -> None:
    """Health ends, open streams say why, and the exit status is its own."""
    with (
        run_inference(world, tmp_path, hang_steps, LORAMUX_STEP_TIMEOUT_S="1") as (process, ready),
        Client(ready["grpc"]) as client,
        grpc.insecure_channel(ready["grpc"]) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=BOUND_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(ReplicaFailed, match="LORAMUX_STEP_TIMEOUT_S"):
            list(client.generate("all", "HELLO"))
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert process.wait() == BROKEN == Exit.BROKEN
    assert "engine step exceeds its time limit" in (tmp_path / "log").read_text()


@pytest.fixture
def builder(tmp_path: Path) -> Iterator[tuple[Forked, str]]:
    """A builder that takes an hour to leave, and its address."""
    address = f"127.0.0.1:{free_port()}"
    flags = ["--grpc", address, "--store", f"file://{tmp_path}/store", "--work-dir", f"{tmp_path}/work"]
    environment = {**os.environ, "LORAMUX_DRAIN_DELAY_S": "3600"}
    with kill_at_end(builder_service(flags, tmp_path / "log", environment)) as process:
        _until(address, "SERVING")
        yield process, address


def _until(address: str, status: str) -> None:
    def health() -> str:
        return CliRunner().invoke(app, ["health", address]).stdout.strip()

    wait_until(lambda: health() == status, f"the health {status}", health)


def test_a_builder_that_leaves_goes_on_until_the_next_signal(builder: tuple[Forked, str]) -> None:
    """A builder is NOT_SERVING and answers after SIGTERM; a second signal ends it at once."""
    process, address = builder
    process.send_signal(signal.SIGTERM)
    _until(address, "NOT_SERVING")
    with Client(builder=address) as client:
        assert client.deployments() == []
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
