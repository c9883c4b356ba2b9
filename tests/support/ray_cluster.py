"""A Ray cluster of two nodes on this machine, with Serve's doors and our applications."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.schema import ApplicationStatus
from ray.util.state import list_actors

from ray_service.app import Options, build
from ray_service.names import APP, ENGINE, SERVICERS

ROOT: Final = Path(__file__).parents[2]
STORE_BYTES: Final = 100 * 1024 * 1024
"""Ray's object store of a node; what we send through it is small."""
ENVIRONMENT: Final = {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'shared'}",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_ENABLE_TASK_EVENTS": "0",
    "RAY_DEDUP_LOGS": "0",
}
PATIENCE_S: Final = 90.0


class RayFleet:
    """Two nodes; the first has Serve's doors, and no replica of ours where `engine` is asked for as a resource."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="lmx-", dir="/tmp"))  # sockets want short paths
        (self._folder / "ray").mkdir()
        environment = ENVIRONMENT | {"RAY_TMPDIR": str(self._folder)}
        self._before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        node = {"num_cpus": 4, "object_store_memory": STORE_BYTES, "node_ip_address": "127.0.0.1"}
        head = {**node, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.second = self.cluster.add_node(**node)
        self.grpc, self.http = free_port(), free_port()
        ray.init(address=self.cluster.address, log_to_driver=bool(os.environ.get("RAY_FLEET_LOG")))
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": "127.0.0.1", "port": self.http},
            grpc_options={
                "port": self.grpc,
                "grpc_servicer_functions": [SERVICERS],
                "enable_reflection": False,
            },
        )

    @property
    def rpc(self) -> str:
        """Where gRPC is."""
        return f"127.0.0.1:{self.grpc}"

    @property
    def url(self) -> str:
        """Where HTTP is."""
        return f"http://127.0.0.1:{self.http}"

    def run(self, settings: Mapping[str, Any], **options: Any) -> None:
        """Deploy, and wait until it runs."""
        app = build(Options(settings=dict(settings), **options))
        serve.run(app, name=APP, route_prefix="/", blocking=False)
        self.until(lambda: serve.status().applications[APP].status == ApplicationStatus.RUNNING)

    def replicas(self) -> int:
        """How many replicas of the engine run."""
        states = serve.status().applications[APP].deployments[ENGINE].replica_states
        return int(states.get("RUNNING", 0))

    def pids(self) -> dict[str, int]:
        """The processes of the engine's replicas, by their nodes."""
        actors = list_actors(filters=[("state", "=", "ALIVE")])
        return {each.name: each.pid for each in actors if f"#{ENGINE}#" in (each.name or "")}

    def until(self, true: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
        """Wait until something is true."""
        end = time.monotonic() + patience_s
        while not true():
            assert time.monotonic() < end, "Ray took too long"
            time.sleep(0.1)

    def close(self) -> None:
        """End all."""
        serve.shutdown()
        ray.shutdown()
        self.cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def free_port() -> int:
    """Draw a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
