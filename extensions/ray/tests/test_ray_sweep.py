"""The long ones on a Ray cluster: nodes and engines that go under traffic, replicas that follow the load."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from loramux.client import Client
from tests.ray_cluster import NAMES
from tests.support.root import ROOT
from tests.support.s3_gateway import free_ports
from tests.support.tiny import World
from tests.support.waiting import BOUND_S
from tests.test_ray import world as world

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(1800)]


def test_a_cluster_to_try_is_one_command(world: World, tmp_path: Path) -> None:
    """`loramux ray up` builds and serves over both APIs, takes an adapter while it does, and leaves nothing."""
    file = tmp_path / "deployment.yaml"
    adapters = {name: {"source": "LOCAL", "repo": str(world.adapters[name])} for name in NAMES[:2]}
    base = {"source": "LOCAL", "repo": str(world.base)}
    file.write_text(
        yaml.safe_dump(
            {"model_name": "tiny", "build": {"checkpoint_repository": base, "lora_adapters": adapters}}
        )
    )
    program = [sys.executable, "-c", "from loramux.cli.entry import main; main()", "ray"]
    variables = {"PYTHONPATH": f"{ROOT}:{ROOT / 'shared'}", "LORAMUX_BACKEND": "torch", "LORAMUX_NATIVE": "0"}
    up = [*program, "up", str(file), "--store", f"file://{tmp_path}/store", "--json"]
    apis = [f"127.0.0.1:{port}" for port in free_ports(2)]
    process = subprocess.Popen(
        [*up, "--grpc", apis[0], "--http", apis[1]],
        env=os.environ | variables,
        text=True,
        stdout=subprocess.PIPE,
    )
    try:
        document = "".join(iter(process.stdout.readline, "}\n")) + "}"
        assert json.loads(document)["models"] == ["tiny", *NAMES[:2]]
        started = psutil.Process(process.pid).children(recursive=True)
        with Client(apis[0], apis[0]) as client:
            pushed = client.push("tiny", "fresh", world.adapters["a5"])
            answer = client.complete(
                "fresh", "Hi", max_tokens=4, min_generation=pushed.generation, timeout_s=BOUND_S
            )
        assert answer.started.generation == 2
        body = {"model": "a1", "prompt": "Hi", "max_tokens": 4}
        assert httpx.post(f"http://{apis[1]}/v1/completions", json=body, timeout=BOUND_S).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(BOUND_S) == 0
        assert not psutil.wait_procs(started, timeout=BOUND_S)[1]
    finally:
        process.kill()
        process.communicate()
