from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from loramux.builder.v1 import builder_pb2 as pb, builder_pb2_grpc
from loramux.messages import deployment_to_message
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.deployment import Deployment
from loramux_shared.storage.local import LocalStore
from tests.support.adapters import tensors, write_adapter, write_base
from tests.support.folders import deployment_of
from tests.support.forks import Forked, builder_service
from tests.support.s3_gateway import free_port
from tests.support.waiting import BOUND_S, wait_until

ADAPTERS = 80
State = pb.Deployment


def environment() -> dict[str, str]:
    """This environment without settings of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LORAMUX_")}


@contextmanager
def builder(folder: Path, port: int) -> Iterator[Forked]:
    """A process of the service on a file store."""
    flags = {
        "--store": f"file://{folder}/store",
        "--grpc": f"127.0.0.1:{port}",
        "--local-root": str(folder),
        "--work-dir": str(folder / "work"),
    }
    words = [part for pair in flags.items() for part in pair]
    process = builder_service(words, folder / "builder.log", environment())
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def stub(port: int) -> builder_pb2_grpc.BuilderServiceStub:
    """A client of the process, once it serves."""
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    grpc.channel_ready_future(channel).result(timeout=BOUND_S)
    return builder_pb2_grpc.BuilderServiceStub(channel)


def make(folder: Path) -> Deployment:
    """A deployment whose bundles take a while to publish, one after the other."""
    write_base(folder / "base")
    names = [f"a{i}" for i in range(ADAPTERS)]
    for i, name in enumerate(names):
        write_adapter(folder / name, tensors(seed=i))
    return deployment_of(folder, *names)


def test_a_killed_builder_leaves_nothing_half_visible_and_goes_on(tmp_path):
    """kill -9 in the middle of a publish: no deployment, only whole bundles; the next start ends the build."""
    expected, port = make(tmp_path), free_port()
    bundles = tmp_path / "store" / "bundles"
    with builder(tmp_path, port) as process:
        client = stub(port)
        answer = client.BuildDeployment(pb.BuildDeploymentRequest(deployment=deployment_to_message(expected)))
        assert answer.deployment.state == State.STATE_BUILDING
        wait_until(lambda: len(list(bundles.glob("sha256/*"))) >= 3, "bundles")
        process.kill()
        process.wait()
    store = LocalStore(tmp_path / "store")
    assert current_generation(store, "tiny") is None
    assert list(store.list("deployments/")) == []
    manifests = [key for key in store.list("bundles/") if key.endswith("/manifest.json")]
    assert len(manifests) < ADAPTERS
    for key in manifests:
        read_bundle(store, key.split("/")[2])
    assert [key.rpartition("/")[0] for key in store.list("builds/")] == ["builds/tiny"]

    port = free_port()
    with builder(tmp_path, port) as process:
        client = stub(port)
        states = [item.deployment for item in client.WatchDeployment(pb.WatchDeploymentRequest(name="tiny"))]
        assert states[-1].state == State.STATE_ACTIVE
        assert [adapter.stage for adapter in states[-1].adapters] == [pb.AdapterBuild.STAGE_DONE] * ADAPTERS
        assert "was interrupted, running it again" in (tmp_path / "builder.log").read_text()
        client.BuildDeployment(pb.BuildDeploymentRequest(deployment=deployment_to_message(expected)))
        again = [item.deployment for item in client.WatchDeployment(pb.WatchDeploymentRequest(name="tiny"))][-1]
        assert (again.state, again.generation, again.unchanged) == (State.STATE_ACTIVE, 1, True)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    assert list(store.list("builds/")) == []
    generation = current_generation(store, "tiny")
    assert generation is not None
    for record in generation.adapters.values():
        read_bundle(store, record.digest)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--store", "ftp://x"], "store 'ftp://x': expected s3://BUCKET/PREFIX, file:///DIR"),
        (["--grpc", "nonsense"], "--grpc=nonsense: expected HOST:PORT"),
        (["--max-concurrent-builds", "0"], "--max-concurrent-builds=0"),
    ],
)
def test_bad_settings_end_the_start(tmp_path, flags, expected):
    """A bad setting is one line with the setting, the value and the allowed values; the status is 2."""
    store = [] if "--store" in flags else ["--store", f"file://{tmp_path}"]
    log = tmp_path / "log"
    assert builder_service([*store, *flags], log, environment()).wait() == 2
    (line,) = log.read_text().splitlines()
    assert expected in line
