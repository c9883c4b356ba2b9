"""Two real API processes before an engine of this process whose steps compute nothing."""

import asyncio
import json
import os
import signal
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import httpx
import psutil
import pytest
import pytest_asyncio

from benchmarks.streams_clients import MODEL
from benchmarks.streams_server import Instant, service
from inference_service.api.processes import children
from inference_service.api.processes.channel import Channel
from inference_service.api.processes.children import ApiProcesses
from inference_service.api.requests.service import GenerationService
from inference_service.api.rpc.servicer import SERVICE_NAME, InferenceServicer
from inference_service.driver.engine_thread import EngineThread
from loramux_shared.faults import SettingsInvalid
from loramux_shared.process import python
from loramux_shared.rpc.server import RpcServer
from loramux_shared.runtime import Limits
from loramux_shared.settings import InferenceSettings
from tests.support.access import Certificates, lines, new_entry
from tests.support.raw_http import JSON, RawClient
from tests.support.waiting import BOUND_S, bounded, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
OTHER = "other"
LONG = 8000
"""Tokens of an answer that outlasts a test."""


def _completion(tokens: int, **more: bool) -> bytes:
    body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": tokens, "ignore_eos": True} | more
    data = json.dumps(body).encode()
    return b"POST /v1/completions HTTP/1.1\r\n%scontent-length: %d\r\n\r\n%s" % (JSON, len(data), data)


@dataclass
class Replica:
    """An engine with API processes."""

    service: GenerationService
    thread: EngineThread
    apis: ApiProcesses
    addresses: dict[str, str]

    async def stream(self, tokens: int = LONG) -> RawClient:
        """Begin an answer on a new connection, and read its first token."""
        client = await RawClient.open(self.addresses["http"])
        await client.send(_completion(tokens, stream=True))
        async with bounded("a first token"):
            await client.reader.readuntil(b"data: ")
        return client

    def pid_of(self, client: RawClient) -> int:
        return self.pid_at(client.writer.get_extra_info("sockname")[1])

    def pid_at(self, port: int) -> int:
        """The process that has the connection of a client's port."""
        for pid in self.apis.pids:
            for each in psutil.Process(pid).net_connections():
                if each.raddr and each.raddr.port == port:
                    return pid
        raise AssertionError("no process has the connection")

    async def streams_of_both(self) -> dict[int, list[RawClient]]:
        """Begin answers until both processes have some; by process."""
        found: dict[int, list[RawClient]] = {}
        while len(found) < 2:
            client = await self.stream()
            found.setdefault(self.pid_of(client), []).append(client)
        return found

    async def until_idle(self) -> None:
        """Wait until the engine and the limits hold nothing."""
        stats = self.thread.stats
        await until(
            lambda: not self.thread.num_open and not self.thread.stats.running,
            "an engine that holds nothing",
            lambda: self.thread.stats,
        )
        assert self.thread.stats.blocks_free == stats.blocks_total


@asynccontextmanager
async def replica(
    folder: Path, count: int = 2, guarded: Mapping[str, Any] = MappingProxyType({}), **times: float
) -> AsyncIterator[Replica]:
    """Serve with API processes; guarded are settings of keys and TLS."""
    made, thread = service(folder, Instant(0.001), (MODEL, OTHER))
    inside = f"unix:{folder}/engine"
    rpc = RpcServer(inside, {SERVICE_NAME: InferenceServicer(made).register})
    await rpc.start()
    settings = InferenceSettings(deployment=MODEL, grpc="127.0.0.1:0", http="127.0.0.1:0", **guarded)
    apis = ApiProcesses(
        settings, made, count, (SERVICE_NAME,), inside, keyless=not guarded, hung_s=BOUND_S, **times
    )
    addresses = await apis.start()
    thread.start(apis.refuse)
    await apis.set_serving()
    await rpc.set_serving(True)
    try:
        yield Replica(made, thread, apis, addresses)
    finally:
        ends = asyncio.gather(apis.drain(0, thread.cut), rpc.drain(0))
        await asyncio.sleep(0)
        assert apis.descriptors == (-1,)  # nobody would accept from it once the processes have ended
        await ends
        await thread.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Replica]:
    async with replica(tmp_path_factory.mktemp("apis")) as made:
        yield made


async def _get(address: str, path: bytes) -> tuple[int, bytes]:
    client = await RawClient.open(address)
    await client.send(b"GET %s HTTP/1.1\r\nhost: localhost\r\n\r\n" % path)
    answer = await client.answer()
    client.close()
    return answer


async def test_a_killed_process_loses_its_streams_and_no_others(served: Replica) -> None:
    """A killed API process closes its streams, the engine frees their sequences, and a new process starts."""
    streams = await served.streams_of_both()
    dead, alive = streams
    left = served.thread.num_open - len(streams[dead])
    os.kill(dead, signal.SIGKILL)
    for client in streams[dead]:
        assert b"[DONE]" not in await client.ended()
    await until(lambda: served.thread.num_open == left, "the end of the killed process's streams")
    for client in streams[alive]:
        async with bounded("more of the other streams"):
            for _ in range(20):
                await client.reader.readuntil(b"data: ")
    await until(lambda: len(served.apis.host.peers) == 2 and dead not in served.apis.pids, "another process")
    for client in streams[alive]:
        client.close()
    again = await served.streams_of_both()
    for client in [client for clients in again.values() for client in clients]:
        client.close()
    await served.until_idle()


async def test_a_process_that_stands_still_delays_no_other(served: Replica) -> None:
    """Streams of the other process go on, and new connections are taken by it."""
    streams = await served.streams_of_both()
    stopped, alive = streams
    os.kill(stopped, signal.SIGSTOP)
    try:
        for client in streams[alive]:
            async with bounded("more of the other streams"):
                for _ in range(50):
                    await client.reader.readuntil(b"data: ")
        later = await served.stream(4)
        assert served.pid_of(later) == alive
        later.close()
    finally:
        os.kill(stopped, signal.SIGCONT)
    async with bounded("more of the stream that stood still"):
        await streams[stopped][0].reader.readuntil(b"data: ")
    for client in [client for clients in streams.values() for client in clients]:
        client.close()
    await served.until_idle()


async def test_metrics_are_sums_over_processes(served: Replica) -> None:
    """The metrics are sums over all API processes, with those of a killed one."""

    async def requests() -> float:
        _, text = await _get(served.addresses["http"], b"/metrics")
        lines = (line for line in text.splitlines() if line.startswith(b"loramux_requests_total{"))
        return sum(float(line.rpartition(b" ")[2]) for line in lines)

    before = await requests()
    streams = await served.streams_of_both()
    clients = [client for clients in streams.values() for client in clients]
    for client in clients:
        client.close()
    await served.until_idle()
    counted = 0.0
    async with bounded("all requests in a scrape"):
        while counted < len(clients):
            counted = await requests() - before
    assert counted == len(clients)


async def test_limits_hold_across_processes(served: Replica) -> None:
    """Tokens that one process served count against the limit of a model in the other."""
    catalog = served.service.local.catalog
    kept = catalog.deployed
    catalog.deployed = kept.model_copy(
        update={"limits": kept.limits.model_copy(update={"models": {MODEL: Limits(tokens_per_minute=100)}})}
    )
    refused: set[int] = set()
    try:
        async with bounded("refusals by both processes"):
            while len(refused) < 2:
                client = await RawClient.open(served.addresses["http"])
                await client.send(_completion(200))
                status, _ = await client.answer()
                if status == 429:
                    refused.add(served.pid_of(client))
                client.close()
    finally:
        catalog.deployed = kept
    assert len(refused) == 2


@pytest.mark.parametrize("count", [1, pytest.param(4, marks=pytest.mark.sweep)])
async def test_every_process_follows_keys_certificates_and_aliases(count: int, tmp_path: Path) -> None:
    """A sticky key has one model in all processes; a new key and a new certificate are taken by all."""
    certificates, keys = Certificates(tmp_path), tmp_path / "keys"
    (old, old_line), (new, new_line) = new_entry("old", "infer"), new_entry("new", "infer")
    keys.write_text(lines(old_line))
    files = certificates.server
    guarded = {"keys_file": keys, "tls_cert": files.cert, "tls_key": files.key}
    async with replica(tmp_path, count, guarded) as served:
        catalog = served.service.local.catalog
        catalog.deployed = catalog.deployed.model_copy(update={"aliases": {"alias": {MODEL: 1, OTHER: 1}}})

        async def all_answer(key: str, trusted: str, sticky: str, expected: int) -> set[str]:
            """Ask on new connections until every process gave the expected status; return the models."""
            context = ssl.create_default_context(cafile=tmp_path / trusted)
            seen: set[int] = set()
            models: set[str] = set()
            body = {"model": "alias", "prompt": [5], "max_tokens": 1, "user": sticky}
            async with bounded(f"{expected} from all processes", lambda: seen):
                while len(seen) < count:
                    async with httpx.AsyncClient(verify=context, trust_env=False, timeout=BOUND_S) as web:
                        headers = {"authorization": f"Bearer {key}"}
                        url = f"https://{served.addresses['http']}/v1/completions"
                        async with web.stream("POST", url, json=body, headers=headers) as answer:
                            _, port = answer.extensions["network_stream"].get_extra_info("client_addr")[:2]
                            pid = served.pid_at(port)
                    if answer.status_code == expected:
                        seen.add(pid)
                        models.add(answer.headers.get("x-loramux-model", ""))
            return models

        picked = [await all_answer(old, "ours.pem", sticky, 200) for sticky in ("ann", "bob", "cid", "dan")]
        assert all(len(models) == 1 for models in picked)
        assert set.union(*picked) == {MODEL, "other"}
        keys.write_text(lines(new_line))
        await all_answer(old, "ours.pem", "ann", 401)
        assert await all_answer(new, "ours.pem", "ann", 200) == picked[0]
        certificates.issue("server", certificates.other)
        assert await all_answer(new, "other.pem", "ann", 200) == picked[0]


async def test_a_process_that_does_not_answer_is_replaced(tmp_path: Path, monkeypatch) -> None:
    """Processes that stand still, do not begin, or end at once are replaced by one of the newest generation."""
    begun, ended, ask = list[str](), list[int](), Channel.ask
    async with replica(tmp_path, 1, look_s=0.05) as served:
        catalog = served.service.local.catalog

        async def watched(channel: Channel, name: str, *arguments: Any) -> Any:
            if name == "begin":
                begun.append(name)
                most = {"request_default_max_tokens": len(begun)}
                catalog.deployed = catalog.deployed.model_copy(update=most)
                for each in catalog.watchers:
                    each()
            if name == "serve" and not ended:
                ended.append(len(begun))
                os.kill(served.apis.pids[0], signal.SIGKILL)
            return await ask(channel, name, *arguments)

        monkeypatch.setattr(Channel, "ask", watched)
        monkeypatch.setattr(children, "python", lambda *_: ("sleep", "1000"))
        served.apis.start_s = 1
        (first,) = served.apis.pids
        os.kill(first, signal.SIGSTOP)
        served.apis.hung_s = 0.1
        await until(lambda: served.apis.pids != [first], "a process that does not begin")
        served.apis.hung_s = BOUND_S
        served.apis.start_s = BOUND_S
        monkeypatch.setattr(children, "python", python)
        peers = served.apis.host.peers
        await until(lambda: ended and len(begun) > ended[0] and peers, "another process that listens")
        await next(iter(peers)).collect()  # it has read of the generation then
        async with httpx.AsyncClient(timeout=BOUND_S) as web:
            body = {"model": MODEL, "prompt": [5], "ignore_eos": True}
            answer = await web.post(f"http://{served.addresses['http']}/v1/completions", json=body)
        assert answer.json()["usage"]["completion_tokens"] == len(begun) == ended[0] + 1


async def test_an_address_in_use_is_named(tmp_path: Path, served: Replica) -> None:
    """A port that other processes listen on is refused, though they share it among themselves."""
    for name in ("grpc", "http"):
        addresses = {"grpc": "127.0.0.1:0", name: served.addresses[name]}
        settings = InferenceSettings(deployment=MODEL, **addresses)
        inside = f"unix:{tmp_path}/engine"
        apis = ApiProcesses(settings, served.service, 1, (SERVICE_NAME,), inside, keyless=True)
        with pytest.raises(SettingsInvalid, match="cannot listen"):
            await apis.start()


async def test_a_call_that_is_refused_unread_has_its_status(served: Replica) -> None:
    """A call that the engine's process refuses while its request is on the way ends with that refusal."""
    async with grpc.aio.insecure_channel(served.addresses["grpc"]) as channel:
        for _ in range(150):  # it was another one once in ten to twenty calls
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/{SERVICE_NAME}/Unknown")(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_an_engine_that_fails_ends_health_first(tmp_path: Path) -> None:
    """Every stream ends with REPLICA_FAILED, and later requests are refused."""
    async with replica(tmp_path, 1) as served:
        stream = await served.stream()
        served.thread.fail("a test says so")
        async with bounded("the reason of the end"):
            await stream.reader.readuntil(b"a test says")
        stream.close()
        status, _ = await _get(served.addresses["http"], b"/health")
        assert status == 503


async def test_api_processes_import_no_torch(served: Replica) -> None:
    """The memory of API processes has no mapping of torch."""
    await until(lambda: len(served.apis.host.peers) == 2, "both processes")
    for pid in served.apis.pids:
        assert not [each.path for each in psutil.Process(pid).memory_maps() if "/torch/" in each.path]
