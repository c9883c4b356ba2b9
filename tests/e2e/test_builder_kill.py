"""Builders as processes: kills, settings, and memory that does not grow with adapters."""

import json
import os
import signal
import struct
import subprocess
import sys
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
from tests.support.processes.forks import Forked, builder_service
from tests.support.processes.watching import kill_at_end
from tests.support.s3_gateway import S3Server, free_port
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
    with kill_at_end(builder_service(words, folder / "builder.log", environment())) as process:
        yield process


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
    for record in generation.adapters.values():
        read_bundle(store, record.digest)


def test_bad_settings_end_the_start(tmp_path):
    """A bad setting is one line with the setting, the value and the allowed values; the status is 2."""
    log = tmp_path / "log"
    assert builder_service(["--store", "ftp://x"], log, environment()).wait() == 2
    (line,) = log.read_text().splitlines()
    assert "store 'ftp://x': expected s3://BUCKET/PREFIX, file:///DIR" in line


HIDDEN, INTERMEDIATE, RANK, LAYERS = 16384, 131072, 64, 3
MODULES = {
    "gate_proj": (HIDDEN, INTERMEDIATE),
    "up_proj": (HIDDEN, INTERMEDIATE),
    "down_proj": (INTERMEDIATE, HIDDEN),
}
BLAS = {"OPENBLAS_NUM_THREADS": "1"}  # as the service has it
ROW_BYTES = 2 * RANK * (HIDDEN + INTERMEDIATE)
LIMIT_BYTES = 160 * 10**6 + 2 * ROW_BYTES

SCRIPT = """
import sys
from pathlib import Path
from builder_service.pipeline.build import build
from builder_service.pipeline.progress import Progress
from builder_service.pipeline.context import BuildContext
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.open import open_store
folder, names = Path(sys.argv[1]), sys.argv[3:]
base = {"source": "LOCAL", "repo": str(folder / "base")}
adapters = {name: {"source": "LOCAL", "repo": str(folder / name)} for name in names}
made = {"checkpoint_repository": base, "lora_adapters": adapters, "max_lora_rank": 64}
context = BuildContext(open_store(sys.argv[2]), open_sources(local_roots=[folder]), folder / "work")
progress = Progress(names)
build(parse_deployment({"model_name": "huge", "build": made}).deployment, context, progress)
print(sum(adapter.bundle_bytes for adapter in progress.adapters))
[line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
print(int(line.split()[1]) * 1024)  # ru_maxrss would be that of the process that started this one
"""


def write_large_adapter(folder: Path, layers: int, mark: int) -> int:
    """Write 57 MB per layer: a number, and else zeros that take no space here; returns the bytes."""
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(MODULES)}))
    entries, offset = {}, 0
    for layer in range(layers):
        for module, (features_in, features_out) in MODULES.items():
            for side, shape in (("A", [RANK, features_in]), ("B", [features_out, RANK])):
                name = f"base_model.model.model.layers.{layer}.mlp.{module}.lora_{side}.weight"
                end = offset + 2 * shape[0] * shape[1]
                entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
                offset = end
    header = json.dumps(entries).encode()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + struct.pack("<H", mark))
        file.truncate(8 + len(header) + offset)
    return offset


def peak_bytes(folder: Path, uri: str, names: list[str], environment: dict[str, str]) -> tuple[int, int]:
    """Build in a process of its own; return the bytes of the bundles and the peak memory."""
    command = [sys.executable, "-c", SCRIPT, str(folder), uri, *names]
    done = subprocess.run(
        command,
        env=os.environ | BLAS | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=BOUND_S,
    )
    size, peak = map(int, done.stdout.splitlines()[-2:])
    return size, peak


@pytest.mark.parametrize("kind", ["file", pytest.param("s3", marks=pytest.mark.sweep)])
def test_memory_does_not_grow_with_an_adapter(tmp_path, s3_server: S3Server, kind):
    """Two adapters at once, of 170 and 57 MB, take at most 160 MB and two of their rows of 19 MB each."""
    write_base(tmp_path / "base", hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS)
    total = write_large_adapter(tmp_path / "large", LAYERS if kind == "file" else 1, 0x3F80)
    total += write_large_adapter(tmp_path / "other", 1, 0x4000)
    uri = f"file://{tmp_path}/store" if kind == "file" else f"s3://{s3_server.new_bucket()}"
    size, peak = peak_bytes(tmp_path, uri, ["large", "other"], s3_server.environment)
    assert size > total
    assert peak <= LIMIT_BYTES, f"{peak / 1e6:.0f} MB"
