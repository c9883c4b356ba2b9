"""A Ray cluster on this machine, with Serve's proxies and our applications."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import ray
from ray import serve
from ray._private import services
from ray._raylet import Config  # type: ignore[attr-defined]
from ray.cluster_utils import Cluster
from ray.exceptions import RayError
from ray.serve._private import api as serve_api, client as serve_client
from ray.serve.api import RunTarget
from transformers import LlamaConfig

from loramux_ray.app import build, build_builder
from loramux_ray.names import APP, BUILDER_APP, ENGINE, MIDDLEWARES, SERVICERS
from loramux_shared.storage.open import open_store
from tests.support.openai_api import TEMPLATE
from tests.support.root import ROOT
from tests.support.s3_gateway import free_ports
from tests.support.tiny import SIZES, World, make_world_of
from tests.support.waiting import BOUND_S, wait_until

NAMES: Final = [f"a{index}" for index in range(8)]
STORE_BYTES: Final = 100 * 1024 * 1024
"""Ray's object store of a node; what we send through it is small."""
EXTENSION: Final = ROOT / "extensions/ray"
ENVIRONMENT: Final = {
    **MIDDLEWARES,
    "PYTHONPATH": f"{ROOT}:{ROOT / 'shared'}:{EXTENSION}:{EXTENSION / 'tests'}",
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(16),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_ENABLE_TASK_EVENTS": "0",
    "RAY_DEDUP_LOGS": "0",
    # Ray's workers are nice to all others; beside processes that are not, they get next to nothing.
    "RAY_worker_niceness": "0",
    # Workers are started when an actor needs one, instead of one for each CPU of a node.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    # A busy machine is slow, and not broken: Ray gives up, or ends and begins again, what takes longer.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": f"{BOUND_S:g}",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": f"{BOUND_S:g}",
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "10",
    "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "20",
    "RAY_gcs_server_port_wait_time_s": f"{BOUND_S:g}",
    "RAY_gcs_rpc_server_connect_timeout_s": f"{BOUND_S:g}",
    "RAY_py_gcs_connect_timeout_s": f"{BOUND_S:g}",
    "RAY_raylet_start_wait_time_s": f"{BOUND_S:g}",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_health_check_initial_delay_ms": "60000",
    "RAY_health_check_timeout_ms": "60000",
}
LOGS: Final = bool(os.environ.get("RAY_FLEET_LOG"))
"""True if the output of Ray's processes is shown."""


@contextmanager
def _patient() -> Iterator[None]:
    """Bound by ``BOUND_S`` those waits of Ray's for nodes and proxies that no variable bounds."""
    get_node = services.get_node

    def node(*provided: Any) -> Any:
        def found() -> Any:
            with suppress(RuntimeError):  # it is not registered yet
                return get_node(*provided)

        return wait_until(found, "a node of Ray's")

    with (
        patch.object(services, "get_node", node),
        patch.object(serve_api, "HTTP_PROXY_TIMEOUT", BOUND_S),
        patch.object(serve_client, "HTTP_PROXY_TIMEOUT", BOUND_S),
    ):
        yield


class RayFleet:
    """A node with the proxies, and others beside it."""

    def __init__(self, nodes: int = 1, **variables: str) -> None:
        """Start the cluster; variables are those of the nodes, an empty one for none."""
        self._ends = ExitStack()
        try:
            self._start(nodes, variables)
        except BaseException:
            self.close()
            raise

    def _start(self, nodes: int, variables: Mapping[str, str]) -> None:
        folder = Path(tempfile.mkdtemp(prefix="lmx-", dir="/tmp"))  # sockets want short paths
        self._ends.callback(shutil.rmtree, folder, ignore_errors=True)
        (folder / "ray").mkdir()
        environment = ENVIRONMENT | {"RAY_TMPDIR": str(folder)} | variables
        self._ends.enter_context(patch.dict(os.environ, environment))
        self._ends.enter_context(_patient())
        Config.initialize("")  # Ray reads its variables when it is imported
        node = {"num_cpus": 4, "object_store_memory": STORE_BYTES}
        # Nobody here reads the dashboard, asks for more nodes, or unless told to, for what processes print.
        head = {**node, "include_dashboard": False, "no_monitor": True, "include_log_monitor": LOGS}
        self.cluster = Cluster()
        self._ends.callback(self.cluster.shutdown)
        self.cluster.add_node(wait=False, **head)
        self.others = [self.cluster.add_node(wait=False, **node) for _ in range(nodes - 1)]
        self.cluster.wait_for_nodes(BOUND_S)
        self.grpc, self.http = free_ports(2)
        ray.init(address=self.cluster.address, log_to_driver=LOGS)
        self._ends.callback(ray.shutdown)
        self._ends.callback(serve.shutdown)
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
        return f"127.0.0.1:{self.grpc}"

    @property
    def url(self) -> str:
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
        """Return the number of running replicas of the engine."""
        states = serve.status().applications[APP].deployments[ENGINE].replica_states
        return sum(count for state, count in states.items() if state == "RUNNING")

    def ask(self, question: Callable[[Any], Any]) -> list[Any]:
        """Return the results of a function of the `Engine`, not one of a module, in each replica's process."""

        def within(actor: Any) -> Any:
            engine = actor._replica_impl._user_callable_wrapper._callable
            return None if engine is None else question(engine)  # None: it starts

        names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
        answers = []
        for name in names:
            if f"#{ENGINE}#" in name:
                with suppress(RayError, ValueError):  # it has just ended
                    answers.append(
                        ray.get(ray.get_actor(name, "serve").__ray_call__.remote(within), timeout=BOUND_S)
                    )
        return [answer for answer in answers if answer is not None]

    def until(self, true: Callable[[], bool], what: str) -> None:
        wait_until(true, what, lambda: serve.status().applications)

    def close(self) -> None:
        self._ends.close()


def ray_world(root: Path) -> World:
    """Make a tiny model with a chat template and eight adapters, and build them into a store below a folder."""
    kinds = {name: {"r": 4, "target_modules": ["q_proj", "v_proj"]} for name in NAMES}
    made = make_world_of(root, LlamaConfig(**SIZES), kinds)
    (made.base / "chat_template.jinja").write_text(TEMPLATE)
    made.build(open_store(f"file://{root}/store"))
    return made


def settings_of(world: World) -> dict[str, Any]:
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
