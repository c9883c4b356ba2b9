"""Replica processes behind the real Envoy: clients while a process ends."""

import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import pytest

from loramux import Client, Finished
from loramux.faults import Fault, ServerUnavailable
from tests.e2e.test_openai_process import world as world
from tests.fleet import Proxy, Running, fleet_of, proxy, running
from tests.support.tiny import World
from tests.support.waiting import BOUND_S, wait_until

MODELS = ("base", "all", "rs", "wide")
FEW, MANY = (60, 4), (530, 8)
"""Calls, and streams that are open meanwhile."""


@dataclass
class Fleet:
    """Replicas and Envoy."""

    replicas: list[Running]
    proxy: Proxy

    def victim(self) -> Running:
        """The replica that answers an adapter."""
        with Client(self.proxy.grpc) as client:
            client.complete("all", "HELLO", max_tokens=1)
        [line] = self.proxy.requests(1)
        return next(each for each in self.replicas if line["replica"] == each.grpc)


@pytest.fixture(scope="module")
def started(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    with (
        running(world, folder, 3) as replicas,
        proxy(fleet_of(each.apis for each in replicas), folder) as envoy,
    ):
        yield Fleet(replicas, envoy)


@pytest.fixture
def fleet(started: Fleet) -> Fleet:
    """A fleet of two idle replicas at least, for a test that ends one."""
    ended = [replica for replica in started.replicas if not replica.alive]
    if len(ended) > 1:
        for replica in ended:
            replica.start()
        for replica in ended:
            replica.until_ready()
        ended = []
    started.proxy.until_healthy(2 * (3 - len(ended)))
    idle = [replica for replica in started.replicas if replica.alive]
    wait_until(lambda: not any(each.load() for each in idle), "replicas without a request")
    started.proxy.forget()
    return started


def _ask(envoy: Proxy, number: int) -> None:
    """Ask a model over one API or the other."""
    model = MODELS[number // 2 % 4]
    if number % 2:
        body = {"model": model, "prompt": "HELLO", "max_tokens": 16, "ignore_eos": True}
        httpx.post(f"{envoy.url}/v1/completions", json=body, timeout=BOUND_S).raise_for_status()
        return
    with Client(envoy.grpc) as client:
        client.complete(model, "HELLO", max_tokens=16, ignore_eos=True, timeout_s=BOUND_S)


def _stream(envoy: Proxy, number: int) -> int:
    """The answers of a long stream that came to their end."""
    with Client(envoy.grpc) as client:
        events = client.generate(
            MODELS[number % 4], "HELLO", max_tokens=240, n=8, ignore_eos=True, timeout_s=BOUND_S
        )
        return sum(isinstance(event, Finished) for event in events)


@pytest.mark.parametrize(("calls", "streams"), [FEW, pytest.param(*MANY, marks=pytest.mark.sweep)])
def test_no_request_fails_when_a_replica_stops(fleet: Fleet, calls: int, streams: int) -> None:
    """A SIGTERM among calls of both APIs and open streams fails no request, and the replica ends with 0."""
    leaving = fleet.victim()
    with ThreadPoolExecutor(12) as pool:
        long = [pool.submit(_stream, fleet.proxy, number) for number in range(streams)]
        wait_until(lambda: leaving.load() > 0, "a stream at the replica that leaves")
        short = []
        for number in range(calls):
            if number == calls // 4:
                leaving.signal(signal.SIGTERM)
            short.append(pool.submit(_ask, fleet.proxy, number))
            short[-1].exception(timeout=BOUND_S) if number % 4 == 0 else None
        assert not [fault for future in short if (fault := future.exception())]
        assert [future.result() for future in long] == [8] * streams
    assert leaving.process.wait(BOUND_S) == 0
    lines = fleet.proxy.requests(calls + streams)
    assert {line["status"] for line in lines} == {200}


@pytest.mark.parametrize(
    ("ends", "calls"),
    [
        (signal.SIGKILL, 8),
        (signal.SIGSTOP, 8),
        pytest.param(signal.SIGKILL, 100, marks=pytest.mark.sweep),
    ],
)
def test_a_replica_that_ends_takes_only_what_it_had_begun(
    fleet: Fleet, ends: signal.Signals, calls: int
) -> None:
    """A replica is killed, or stands still: requests without a token are answered elsewhere, streams fail."""
    dying = fleet.victim()
    with Client(fleet.proxy.grpc) as client, ThreadPoolExecutor(calls) as pool:
        begun = client.generate("all", "HELLO", max_tokens=240, n=32, ignore_eos=True, timeout_s=BOUND_S)
        next(begun)
        dying.pause()
        waiting: list[Future[None]] = [pool.submit(_ask, fleet.proxy, number) for number in range(calls)]

        def held_there() -> bool:
            """Return True if every request has ended, or is at the replica that dies."""
            return dying.load() - 1 + sum(future.done() for future in waiting) == calls

        wait_until(held_there, "answers of the other replicas", dying.load)
        held = dying.load() - 1
        dying.signal(ends)
        assert not [fault for future in waiting if (fault := future.exception())]
        with pytest.raises(ServerUnavailable) as caught:
            list(begun)
        assert isinstance(caught.value, Fault)
        assert caught.value.retry_after_s is not None
    lines = fleet.proxy.requests(calls + 1)
    assert held > 0
    assert sum(line["attempts"] > 1 for line in lines) >= held
    dying.process.kill()
    dying.process.wait(BOUND_S)
