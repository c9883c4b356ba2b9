"""Clients (sync and asyncio) over several replicas: real servers on loopback with wires that can be cut."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import grpc
import pytest

from loramux import AsyncClient, Client, Delta, Started, faults
from loramux.connection import Address, Credentials
from loramux.fleet.fleet import REPEATED, STREAMS, AsyncFleetCalls, Fleet, FleetCalls
from loramux.fleet.members import Members
from loramux.inference.v1 import adapters_pb2, inference_pb2 as pb
from loramux.inference.v1.inference_pb2_grpc import InferenceServiceStub
from loramux_shared.access.guard import Guard
from tests.support.access import NOBODY, Certificates
from tests.support.fleet_replicas import MODELS, Replicas, open_replicas
from tests.support.waiting import BOUND_S, bounded, until, wait_until

TEXT = "the grey sea sings (0)"


@pytest.fixture
def three() -> Iterator[Replicas]:
    with open_replicas(3) as made:
        yield made


@pytest.fixture
def client(three: Replicas) -> Iterator[Client]:
    with Client(three.addresses, timeout_s=BOUND_S) as made:
        yield made


def start(three: Replicas, _: object) -> str:
    """Return the replica that has answered a client's only request, which is forgotten."""
    [first] = [address for address in three.addresses if three[address].requests]
    three[first].requests.clear()
    three[first].headers.clear()
    return first


def homes(three: Replicas, client: Client) -> list[str]:
    """Ask once, and return the replicas in the order in which this client goes on to them."""
    first = three.addresses.index(start(three, client.complete("base", "probe")))
    return three.addresses[first:] + three.addresses[:first]


class Reading:
    """A thread that reads an answer."""

    def __init__(self, client: Client, model: str, prompt: str) -> None:
        self.seen: list[Any] = []
        """Events that it read, a fault at the end."""
        self._thread = threading.Thread(target=self._read, args=(client, model, prompt), daemon=True)
        self._thread.start()

    def _read(self, client: Client, model: str, prompt: str) -> None:
        try:
            self.seen.extend(client.generate(model, prompt, timeout_s=BOUND_S))
        except faults.Fault as fault:
            self.seen.append(fault)

    def ended(self) -> list[Any]:
        self._thread.join(BOUND_S)
        assert not self._thread.is_alive()
        return self.seen


async def test_a_client_stays_where_it_began(three: Replicas) -> None:
    """Every answer comes from the same replica, whatever the model, and names the model to proxies."""
    async with AsyncClient(",".join(three.addresses)) as aio:
        first = start(three, await aio.complete("base", "probe"))
        for model in MODELS:
            answer = await aio.complete(model, "hi")
            assert (answer.text, answer.started.model) == (TEXT, model)
    assert [three[each].headers for each in three.addresses] == [
        [*MODELS] if each == first else [] for each in three.addresses
    ]


def test_a_replica_that_is_not_serving_gets_nothing_new(three: Replicas, client: Client) -> None:
    """A draining replica finishes its streams, gets no new requests, and gets its models back afterwards."""
    first, second, _ = homes(three, client)
    before = Reading(client, "lora1", "held")
    wait_until(lambda: before.seen[1:], "its first piece")
    three.serving(first, False)
    wait_until(lambda: client.complete("lora1", "hi") and three[second].requests, "an answer of the next one")
    count = len(three[first].requests)
    client.complete("lora1", "hi")
    assert len(three[first].requests) == count
    three.serving(first, True)
    wait_until(
        lambda: client.complete("lora1", "hi") and len(three[first].requests) > count, "an answer of the first"
    )
    three.release()
    assert "".join(each.text for each in before.ended() if isinstance(each, Delta)) == TEXT


def test_what_had_no_token_is_answered_elsewhere(three: Replicas, client: Client) -> None:
    """A client sees one answer when a replica goes after it took the request."""
    first, second, _ = homes(three, client)
    three[first].silences.add("hi")
    reading = Reading(client, "lora1", "hi")
    wait_until(lambda: three[first].open, "the request")
    three.cut(first)
    assert [type(each).__name__ for each in reading.ended()] == ["Started", *["Delta"] * 5, "Finished"]
    assert len(three[second].requests) == 1


def test_what_had_tokens_is_unavailable(three: Replicas, client: Client) -> None:
    """An answer that had begun is not begun again, and the fault says when to retry."""
    first, *_ = homes(three, client)
    reading = Reading(client, "lora1", "held")
    wait_until(lambda: len(reading.seen) >= 2, "its first piece")
    three.cut(first)
    *events, fault = reading.ended()
    assert [type(each) for each in events] == [Started, Delta]
    assert isinstance(fault, faults.ServerUnavailable)
    assert fault.retry_after_s
    assert sum(three.counts) == 1
    assert client.complete("lora1", "hi").text == TEXT


async def test_the_same_on_an_event_loop(three: Replicas) -> None:
    """A request without a token is answered elsewhere, and one with tokens is unavailable."""
    async with AsyncClient(three.addresses) as aio:
        first = start(three, await aio.complete("base", "probe"))
        three[first].silences.add("hi")
        lost = aio.generate("lora1", "held")
        assert [type(await anext(lost)), type(await anext(lost))] == [Started, Delta]
        saved = asyncio.create_task(aio.complete("lora1", "hi"))
        await until(lambda: three[first].open == 2, "both requests")
        three.cut(first)
        assert (await saved).text == TEXT
        with pytest.raises(faults.ServerUnavailable):
            await anext(lost)


def test_what_is_refused_is_asked_elsewhere(three: Replicas, client: Client) -> None:
    """A refused request goes to another replica; a fault that every replica would raise is unchanged."""
    first, second, _ = homes(three, client)
    three[first].refuses = faults.QueueFull("full", retry_after_s=60)
    for _ in range(3):
        assert client.complete("lora1", "hi").text == TEXT
    assert (len(three[first].requests), len(three[second].requests)) == (1, 3)
    three[second].refuses = faults.RequestInvalid("no")
    with pytest.raises(faults.RequestInvalid):
        client.complete("lora1", "hi")
    assert sum(three.counts) == 5


def test_calls_that_meet_the_end_of_their_replica(three: Replicas, client: Client) -> None:
    """Calls of a fleet are retried elsewhere; calls to one address are unavailable; none is cancelled."""
    first, *_ = homes(three, client)
    ended, refused = threading.Event(), 0

    def ask(client: Client) -> list[faults.Fault]:
        nonlocal refused
        seen: list[faults.Fault] = []
        while not ended.is_set():
            try:
                client.complete("lora1", "hi")
            except faults.Fault as fault:
                seen.append(fault)
                refused += 1
        return seen

    with Client(first) as single, ThreadPoolExecutor(6) as pool:
        of_fleet = [pool.submit(ask, client) for _ in range(3)]
        of_single = [pool.submit(ask, single) for _ in range(3)]
        try:
            wait_until(lambda: len(three[first].requests) > 30, "calls before the drain")
            three.drain(first)
            wait_until(lambda: sum(three.counts) > len(three[first].requests) + 10, "calls after the drain")
            wait_until(lambda: refused > 8, "calls of one address after the drain")
        finally:
            ended.set()
    assert not [fault for each in of_fleet for fault in each.result()]
    reported = [fault for each in of_single for fault in each.result()]
    assert {type(fault) for fault in reported} <= {faults.ShuttingDown, faults.ServerUnavailable}
    assert all(fault.retry_after_s for fault in reported)


def test_nobody_there_is_a_named_fault() -> None:
    """An unreachable fleet is a named fault for streams and calls; a silent replica is not waited for."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hole = f"127.0.0.1:{silent.getsockname()[1]}"
        with Client(["127.0.0.1:1", hole, "127.0.0.1:2"]) as client:
            with pytest.raises(faults.ServerUnavailable, match="none of 3 replicas"):
                client.complete("lora1", "hi", timeout_s=BOUND_S)
            with pytest.raises(faults.ServerUnavailable, match="none of 3 replicas"):
                client.models()
    with (
        Client("dns:///no.such.host.invalid:1") as client,
        pytest.raises(faults.ServerUnavailable, match="resolves"),
    ):
        client.models()
    with pytest.raises(faults.SettingsInvalid, match="a: expected"):
        Client("a,b:1")


def test_a_deadline_bounds_all_tries(three: Replicas, client: Client, monkeypatch) -> None:
    """A deadline also bounds the tries that come after a replica failed."""
    first, *_ = homes(three, client)
    for address in three.addresses:
        three[address].silences.add("hi")
    reading = Reading(client, "lora1", "hi")
    wait_until(lambda: sum(three.counts), "the request")
    monkeypatch.setattr("loramux.fleet.trip.time", Mock(monotonic=lambda: time.monotonic() + BOUND_S))
    three.cut(first)
    assert isinstance(reading.ended()[-1], faults.DeadlineExceeded)


async def test_closing_ends_open_streams(three: Replicas) -> None:
    """A stream of a client that is closed ends with a name, and is not asked again elsewhere."""
    client, aio = Client(three.addresses), AsyncClient(three.addresses)
    reading, task = Reading(client, "lora1", "silent"), asyncio.create_task(aio.complete("lora1", "silent"))
    await until(lambda: sum(three.counts) == 2, "both requests")
    client.close()
    await aio.close()
    assert isinstance((await asyncio.to_thread(reading.ended))[-1], faults.CallFailed)
    with pytest.raises(faults.CallFailed, match="closed"):
        await task
    with pytest.raises(faults.CallFailed, match="closed"):
        client.complete("lora1", "hi")
    assert sum(three.counts) == 2


def fleet_of(three: Replicas, kind: Any) -> tuple[Fleet, list[str], list[float]]:
    """Return a fleet behind a name, the name's current addresses, and the clock by which it is looked up."""
    there, now = [three.addresses[0]], [0.0]
    members = Members(["dns:///replicas:1"], lambda _: [Address(each) for each in there], lambda: now[0])
    return Fleet(members, Credentials(**NOBODY), kind), there, now


def test_a_name_is_followed(three: Replicas) -> None:
    """A new replica behind the name gets requests, and a removed one none; its streams end as they would."""
    fleet, there, now = fleet_of(three, grpc)
    calls: Any = FleetCalls(fleet, InferenceServiceStub)

    def ask(text: str) -> Any:
        return calls.Generate(pb.GenerateRequest(model="lora1", text=text), timeout=BOUND_S)

    running = ask("held")
    assert next(running).HasField("started")
    there[:] = [three.addresses[1]]
    now[0] = 60.0
    wait_until(lambda: len(list(ask("hi"))) and three.counts[1], "an answer of the new replica")
    before = three.counts[0]
    list(ask("hi"))
    assert three.counts[0] == before
    three.release()
    assert len(list(running)) == 6
    list(ask("hi"))
    [channel] = fleet.close()
    channel.close()


async def test_a_name_is_followed_on_an_event_loop(three: Replicas) -> None:
    """A failure brings the next lookup of a name forward."""
    fleet, there, now = fleet_of(three, grpc.aio)
    calls: Any = AsyncFleetCalls(fleet, InferenceServiceStub)

    async def ask() -> int:
        return len([each async for each in calls.Generate(pb.GenerateRequest(model="base", text="hi"))])

    assert await ask() == 7
    there[:] = [three.addresses[1]]
    three.cut(three.addresses[0])
    now[0] = 1.5
    with suppress(faults.ServerUnavailable):
        await ask()
    async with bounded("an answer of the new replica"):
        while not three.counts[1]:
            with suppress(faults.ServerUnavailable):
                await ask()
    [channel] = fleet.close()
    await channel.close()


def test_a_name_with_tls(tmp_path: Path) -> None:
    """A certificate for the name is enough, whatever the addresses behind it."""
    certificates = Certificates(tmp_path)
    certificates.issue("server", certificates.ours, "localhost")
    options = NOBODY | {"tls_ca": tmp_path / "ours.pem"}
    with open_replicas(1, Guard(tls=certificates.server)) as one:
        port = one.addresses[0].rpartition(":")[2]
        with Client(f"grpcs://dns:///localhost:{port}", timeout_s=BOUND_S, **options) as client:
            assert client.complete("lora1", "hi").text == TEXT
        with (
            Client(f"grpcs://127.0.0.1:{port},grpcs://127.0.0.1:1", timeout_s=BOUND_S, **options) as client,
            pytest.raises(faults.ServerUnavailable),
        ):
            client.complete("lora1", "hi")


def test_what_is_repeated() -> None:
    """A method is the same when it is called twice, or asks one replica alone; all streams are read as such."""
    services = [each for file in (pb, adapters_pb2) for each in file.DESCRIPTOR.services_by_name.values()]
    methods = [method for service in services for method in service.methods]
    once = {method.name for method in methods if not method.name.startswith(REPEATED)}
    assert once == {"LoadAdapter", "UnloadAdapter", "RollbackReplica"}
    assert {method.name for method in methods if method.server_streaming} == set(STREAMS)
