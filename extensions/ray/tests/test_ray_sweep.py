"""The long ones on a Ray cluster: nodes and engines that go under traffic, replicas that follow the load."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
import yaml
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from loramux.client import Client
from loramux.faults import Fault
from loramux.records import Delta
from loramux_ray.names import APP, MIDDLEWARES
from tests.ray_cluster import NAMES, RayFleet, ray_world, settings_of
from tests.support.root import ROOT
from tests.support.s3_gateway import free_port
from tests.support.tiny import World
from tests.support.waiting import BOUND_S, wait_until

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(1800)]

LONG: dict[str, Any] = {"max_tokens": 120, "ignore_eos": True, "timeout_s": BOUND_S}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny model and eight adapters, built."""
    return ray_world(tmp_path_factory.mktemp("ray"))


class Traffic:
    """Requests over both APIs, one after the other in each of some threads, and how they ended."""

    def __init__(self, fleet: RayFleet, threads: int = 6) -> None:
        self.ends: Counter[str] = Counter()
        self._fleet = fleet
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(threads)]
        for thread in self._threads:
            thread.start()

    def end(self) -> Counter[str]:
        """Stop; how often each end came."""
        self._stop.set()
        for thread in self._threads:
            thread.join(BOUND_S)
            assert not thread.is_alive()
        return self.ends

    def goes_on(self, answers: int = 12) -> None:
        """Wait until so many more have ended."""
        before = self.ends.total()
        wait_until(lambda: self.ends.total() >= before + answers, f"{answers} answers", lambda: self.ends)

    def _run(self, index: int) -> None:
        names = ["base", *NAMES][index:] + ["base", *NAMES][:index]
        number = 0
        with Client(self._fleet.rpc) as client, httpx.Client(base_url=self._fleet.url, timeout=BOUND_S) as http:
            while not self._stop.is_set():
                number += 1
                model = names[number % len(names)]
                self.ends[self._rpc(client, model) if index % 2 else self._http(http, model)] += 1

    def _rpc(self, client: Client, model: str) -> str:
        tokens = 0
        try:
            for event in client.generate(model, "Whereas", **LONG):
                tokens += len(event.token_ids) if isinstance(event, Delta) else 0
        except Fault as fault:
            return f"gRPC {fault.reason} retry={fault.retry_after_s} begun={tokens > 0}"
        return "OK" if tokens == LONG["max_tokens"] else f"gRPC {tokens} tokens"

    def _http(self, http: httpx.Client, model: str) -> str:
        body = {"model": model, "prompt": "Whereas", "max_tokens": 120, "ignore_eos": True, "stream": True}
        answer = http.post("/v1/completions", json=body)
        if answer.status_code != 200:
            return f"HTTP {answer.status_code} {answer.text[:80]}"
        if answer.text.endswith("data: [DONE]\n\n"):
            return "OK"
        return f"HTTP cut, replica_failed={'replica_failed' in answer.text}"


ALLOWED = {"OK", "gRPC REPLICA_FAILED retry=1.0 begun=True", "HTTP cut, replica_failed=True"}
"""Ends of requests while a replica or a node goes: only what had begun fails."""


def test_an_engine_that_breaks_and_a_node_that_goes_cost_what_had_begun(world: World) -> None:
    """Only answers with tokens end with UNAVAILABLE when an engine or a node fails, and new replicas start."""
    quickly = {
        "RAY_health_check_initial_delay_ms": "5000",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }
    fleet = RayFleet(nodes=2, **quickly)
    try:
        fleet.run(settings_of(world), replicas=3, num_cpus=1.5)
        before = set(fleet.ask(lambda _: os.getpid()))
        assert len(set(fleet.ask(lambda _: ray.get_runtime_context().get_node_id()))) == 2
        traffic = Traffic(fleet)
        traffic.goes_on()
        victim = min(before)
        fleet.ask(lambda engine: engine._replica.ready.engine._end("tested") if os.getpid() == victim else None)
        fleet.until(lambda: gone(victim), "the end of the broken replica")
        fleet.until(lambda: fleet.running() == 3, "three replicas")
        traffic.goes_on()
        fleet.cluster.remove_node(fleet.others[0], allow_graceful=False)
        fleet.until(lambda: sum(node["Alive"] for node in ray.nodes()) == 1, "one node")
        fleet.until(lambda: fleet.running() >= 2, "two replicas")
        traffic.goes_on()
        assert set(traffic.end()) <= ALLOWED, traffic.ends
        print(traffic.ends)  # noqa: T201 - the table of docs/guides/fleet.md
    finally:
        fleet.close()


def gone(pid: int) -> bool:
    """True when the process has ended."""
    return not Path(f"/proc/{pid}").exists()


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
