"""The metrics of a builder, and their server."""

import select
import socket
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge

from builder_service.meter import LIMIT_S, MAX_CLIENTS, BuildMeter, MetricsServer
from loramux_shared.faults import SettingsInvalid
from tests.support.builders import Builders
from tests.support.metrics import Scrape
from tests.support.waiting import BOUND_S, wait_until


async def scrape(address: str) -> Scrape:
    async with httpx.AsyncClient(timeout=BOUND_S) as web:
        return Scrape((await web.get(f"http://{address}/metrics")).text)


async def test_builds_are_counted_by_outcome(tmp_path: Path) -> None:
    """A build that runs is running; one that ends is counted under OK or its reason, with its seconds."""
    world = Builders(tmp_path)
    world.store.gate.clear()
    builds = world.builder()
    meter = BuildMeter(builds.count_running)
    builds.watchers.append(meter.ended)
    address = meter.listen("127.0.0.1:0", insecure=False)
    await builds.build(world.deployment("one"))
    busy = await scrape(address)
    assert busy.value("loramux_builds_running") == 1
    assert busy.series("loramux_builds_total") == []
    await builds.build(world.deployment("bad", name="other"))
    await world.close()
    done = await scrape(address)
    assert done.value("loramux_builds_running") == 0
    assert done.value("loramux_builds_total", outcome="OK") == 1
    assert done.value("loramux_builds_total", outcome="ADAPTER_INVALID") == 1
    assert done.value("loramux_build_seconds_count") == 2
    assert done.value("loramux_build_seconds_sum") > 0
    assert not any(name in done.text for name in ("tiny", "other"))


@pytest.mark.parametrize("address", ["0.0.0.0:0", "unix:/tmp/metrics"])
def test_it_is_not_opened_to_others_by_accident(address: str) -> None:
    """The metrics endpoint requires no key, so it listens on loopback unless a setting allows others."""
    with pytest.raises(SettingsInvalid, match="or LORAMUX_INSECURE=1"):
        BuildMeter(lambda: 0).listen(address, insecure=False)
    if not address.startswith("unix"):
        assert BuildMeter(lambda: 0).listen(address, insecure=True).startswith("0.0.0.0:")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:9090"}, 200),
        ({"host": "Metrics.example"}, 200),
        ({"host": "evil.example"}, 403),
        ({"origin": "https://evil.example"}, 403),
    ],
)
def test_it_is_open_to_no_other_site(headers: dict[str, str], status: int) -> None:
    """A page whose name resolves to this machine reads nothing."""
    address = BuildMeter(lambda: 0).listen("127.0.0.1:0", insecure=False, hosts=("metrics.example",))
    answer = httpx.get(f"http://{address}/metrics", headers=headers, timeout=BOUND_S)
    assert (answer.status_code, "LORAMUX_HTTP_HOSTS" in answer.text) == (status, status == 403)


def test_an_address_that_is_taken() -> None:
    """The message names the setting and the value."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsInvalid, match=rf"LORAMUX_METRICS=127\.0\.0\.1:{port}: .*free HOST:PORT"):
            BuildMeter(lambda: 0).listen(f"127.0.0.1:{port}", insecure=False)


def test_silent_clients_are_closed() -> None:
    """The oldest beyond the bound leave for newer ones, others after their time; a new client is answered."""
    time_s = [0.0]
    registry = CollectorRegistry()
    Gauge("seen", "1.", registry=registry).set(1)
    api = MetricsServer("127.0.0.1", 0, registry, clock=lambda: time_s[0])
    api.start()
    address = ("127.0.0.1", api.server_port)
    try:
        idle = [socket.create_connection(address, timeout=BOUND_S) for _ in range(2 * MAX_CLIENTS)]
        wait_until(lambda: closed_of(idle) == idle[:MAX_CLIENTS], "the end of those beyond the bound")
        text = httpx.get(f"http://{address[0]}:{address[1]}/metrics", timeout=BOUND_S).text
        assert ("seen 1.0" in text, closed_of(idle)) == (True, idle[: MAX_CLIENTS + 1])
        time_s[0] = LIMIT_S
        assert [each.recv(1) for each in idle] == [b""] * len(idle)
        for each in idle:
            each.close()
    finally:
        api.shutdown()
        api.server_close()


def closed_of(connections: list[socket.socket]) -> list[socket.socket]:
    return select.select(connections, [], [], 0)[0]
