"""/metrics of the builder, as Prometheus reads it."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge

from builder_service.builds.meter import BuildMeter
from builder_service.builds.metrics_door import MAX_CLIENTS, MetricsDoor
from loramux_shared.faults import SettingsInvalid
from tests.contract.builds.test_build_lifecycle import OWNER, World
from tests.support.metrics import Scrape


async def scrape(address: str) -> Scrape:
    """What the builder says at its address of metrics."""
    async with httpx.AsyncClient() as web:
        return Scrape((await web.get(f"http://{address}/metrics")).text)


async def after_builds(address: str, count: int) -> Scrape:
    """What it says when so many builds have ended."""
    for _ in range(1000):
        said = await scrape(address)
        if said.value("loramux_build_seconds_count") == count:
            return said
        await asyncio.sleep(0.01)
    raise AssertionError("builds do not end")


async def test_builds_are_counted_by_outcome(tmp_path: Path) -> None:
    """A build that runs is running; one that ends is counted under OK or its reason, with its seconds."""
    world = World(tmp_path)
    builds = world.builder(OWNER)
    address = builds.meter.listen("127.0.0.1:0", insecure=False)
    await builds.build(world.deployment("one"))
    busy = await scrape(address)
    assert busy.value("loramux_builds_running") == 1
    assert busy.series("loramux_builds_total") == []
    world.store.gate.set()
    await after_builds(address, 1)
    await builds.build(world.deployment("bad", name="other"))
    said = await after_builds(address, 2)
    assert said.value("loramux_builds_running") == 0
    assert said.value("loramux_builds_total", outcome="OK") == 1
    assert said.value("loramux_builds_total", outcome="ADAPTER_INVALID") == 1
    assert said.value("loramux_build_seconds_sum") > 0
    assert not any(name in said.text for name in ("tiny", "other"))
    await builds.drain(5)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "unix:/tmp/metrics"])
def test_it_is_not_opened_to_others_by_accident(address: str) -> None:
    """Nobody is asked for a key there, so it listens on loopback, unless one says otherwise."""
    with pytest.raises(SettingsInvalid, match=r"loopback, or LORAMUX_INSECURE=1"):
        BuildMeter(lambda: 0).listen(address, insecure=False)
    if not address.startswith("unix"):
        assert BuildMeter(lambda: 0).listen(address, insecure=True).startswith("0.0.0.0:")


def test_an_address_that_is_taken() -> None:
    """The message names the setting and the value."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsInvalid, match=rf"LORAMUX_METRICS=127\.0\.0\.1:{port}: .*free HOST:PORT"):
            BuildMeter(lambda: 0).listen(f"127.0.0.1:{port}", insecure=False)


def test_metrics_wait_for_nobody() -> None:
    """Clients that ask nothing are closed, those beyond the bound at once, and then others are answered."""
    registry = CollectorRegistry()
    Gauge("seen", "1.", registry=registry).set(1)
    door = MetricsDoor("127.0.0.1", 0, registry, limit_s=0.3)
    door.start()
    idle = [
        socket.create_connection(("127.0.0.1", door.server_port), timeout=5) for _ in range(2 * MAX_CLIENTS)
    ]
    assert [each.recv(1) for each in idle] == [b""] * len(idle)
    for each in idle:
        each.close()
    assert "seen 1.0" in httpx.get(f"http://127.0.0.1:{door.server_port}/metrics").text
    door.shutdown()
    door.server_close()
