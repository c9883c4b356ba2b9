"""The long ones on a Ray cluster: nodes and engines that go under traffic, replicas that follow the load."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from loramux.client import Client
from loramux_ray.names import APP, MIDDLEWARES
from tests.ray_cluster import NAMES, RayFleet, ray_world, settings_of
from tests.support.root import ROOT
from tests.support.s3_gateway import free_port
from tests.support.tiny import World
from tests.support.waiting import BOUND_S

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny model and eight adapters, built."""
    return ray_world(tmp_path_factory.mktemp("ray"))


def test_replicas_follow_what_runs_and_waits(world: World) -> None:
    """The replicas grow to two under two requests for many answers, then to one again (Serve's config file)."""
    config = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text())
    app = next(each for each in config["applications"] if each["name"] == APP)
    app["args"] |= {"settings": settings_of(world), "max_replicas": 2, "num_cpus": 1, "num_gpus": 0}
    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 6,
        "upscale_delay_s": 1,
        "downscale_delay_s": 3,
        "look_back_period_s": 2,
        "policy": {"policy_function": "loramux_ray.scaling:by_sequences"},
    }
    app["deployments"] = [{"name": "Engine", "autoscaling_config": scaling}]
    # Without the variable, a `Ingress` hands on HTTP requests.
    fleet = RayFleet(**dict.fromkeys(MIDDLEWARES, ""))
    try:
        _get_global_client().deploy_apps(ServeDeploySchema(applications=[app]), _blocking=True)
        seen, failures, stop = {fleet.running()}, [], threading.Event()

        def ask() -> None:
            while not stop.is_set():
                body = {"model": "a1", "prompt": "Whereas", "max_tokens": 200, "ignore_eos": True, "n": 8}
                answer = httpx.post(f"{fleet.url}/v1/completions", json=body, timeout=BOUND_S)
                if answer.status_code != 200 or len(answer.json()["choices"]) != 8:
                    failures.append(answer.text)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            fleet.until(lambda: fleet.running() == 2, "two replicas")
        finally:
            stop.set()
        seen.add(2)
        for thread in threads:
            thread.join(BOUND_S)
            assert not thread.is_alive()
        fleet.until(lambda: fleet.running() == 1, "one replica")
        assert seen == {1, 2}
        assert not failures
    finally:
        fleet.close()


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
    apis = [f"127.0.0.1:{free_port()}" for _ in range(2)]
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
