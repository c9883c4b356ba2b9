"""A Ray cluster of two nodes on this machine, with Serve's doors and our applications."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import ray
from ray import serve
from ray._raylet import Config  # type: ignore[attr-defined]
from ray.cluster_utils import Cluster
from ray.exceptions import RayError
from ray.serve.api import RunTarget
from transformers import LlamaConfig

from loramux_shared.storage.open import open_store
from ray_service.app import build, build_builder
from ray_service.names import APP, BUILDER_APP, ENGINE, MIDDLEWARES, SERVICERS
from tests.support.openai_door import TEMPLATE
from tests.support.root import ROOT
from tests.support.tiny import SIZES, World, make_world_of

NAMES: Final = [f"a{index}" for index in range(8)]
STORE_BYTES: Final = 100 * 1024 * 1024
"""Ray's object store of a node; what we send through it is small."""
ENVIRONMENT: Final = {
    **MIDDLEWARES,
    "PYTHONPATH": f"{ROOT}:{ROOT / 'shared'}",
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(16),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_ENABLE_TASK_EVENTS": "0",
    "RAY_DEDUP_LOGS": "0",
}
PATIENCE_S: Final = 90.0
LOGS: Final = bool(os.environ.get("RAY_FLEET_LOG"))
"""Whether what Ray's processes print is shown."""


class RayFleet:
    """Two nodes, of which the first has the doors."""

    def __init__(self, **variables: str) -> None:
        """Start it; variables are those of the nodes, an empty one for none."""
        self._folder = Path(tempfile.mkdtemp(prefix="lmx-", dir="/tmp"))  # sockets want short paths
        (self._folder / "ray").mkdir()
        environment = ENVIRONMENT | {"RAY_TMPDIR": str(self._folder)} | variables
        self._before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        Config.initialize("")  # Ray reads its variables when it is imported
        node = {"num_cpus": 4, "object_store_memory": STORE_BYTES}
        # Nobody here reads the dashboard, asks for more nodes, or unless told to, for what processes print.
        head = {**node, "include_dashboard": False, "no_monitor": True, "include_log_monitor": LOGS}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.second = self.cluster.add_node(**node)
        self.grpc, self.http = free_port(), free_port()
        ray.init(address=self.cluster.address, log_to_driver=LOGS)
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

    def run(
        self, settings: Mapping[str, Any], builder: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Deploy an engine, and a builder where its settings are given, and wait until they run."""
        targets = [RunTarget(build({"settings": dict(settings), **options}), APP)]
        if builder is not None:
            targets.append(RunTarget(build_builder(dict(builder)), BUILDER_APP, route_prefix=None))
        serve.run_many(targets)

    def running(self) -> int:
        """How many replicas of the engine run."""
        states = serve.status().applications[APP].deployments[ENGINE].replica_states
        return sum(count for state, count in states.items() if state == "RUNNING")

    def ask(self, question: Callable[[Any], Any]) -> list[Any]:
        """What a function, not one of a module, returns in the process of each replica, given its `Engine`."""

        def within(actor: Any) -> Any:
            engine = actor._replica_impl._user_callable_wrapper._callable
            return None if engine is None else question(engine)  # None: it starts

        names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
        answers = []
        for name in names:
            if f"#{ENGINE}#" in name:
                with suppress(RayError, ValueError):  # it has just ended
                    answers.append(
                        ray.get(ray.get_actor(name, "serve").__ray_call__.remote(within), timeout=30)
                    )
        return [answer for answer in answers if answer is not None]

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


def ray_world(root: Path) -> World:
    """Make a tiny model with a chat template and eight adapters, and build them into a store below a folder."""
    kinds = {name: {"r": 4, "target_modules": ["q_proj", "v_proj"]} for name in NAMES}
    made = make_world_of(root, LlamaConfig(**SIZES), kinds)
    (made.base / "chat_template.jinja").write_text(TEMPLATE)
    made.build(open_store(f"file://{root}/store"))
    return made


def settings_of(world: World) -> dict[str, Any]:
    """What a replica is told."""
    return {
        "deployment": "tiny",
        "store": f"file://{world.root}/store",
        "dtype": "float32",
        "backend": "torch",
        "native": False,
        "threads": 1,
        "kv_memory_gb": 0.01,
        "adapter_disk_gb": 0,
        "local_roots": [str(world.root)],
        "cache_dir": str(world.root / "cache"),
        "follow_interval_s": 0.2,
        "log_format": "json",
    }


def free_port() -> int:
    """Draw a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
