"""Replicas with names, keys and certificates behind the real Envoy, and clients that do not read."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx

from inference_service.openai_api import protocol
from loramux import AsyncClient
from loramux.envoy.fleet import Tls
from loramux_shared.access.guard import Guard
from loramux_shared.rpc import calls
from tests.support.access import Certificates, keyring
from tests.support.endless import Endless, doors_of
from tests.support.fleet import until
from tests.support.scripted_fleet import Fleet, behind_envoy, envoy_of
from tests.support.scripted_replica import MODELS, ScriptedReplica


async def test_replicas_with_tls_and_keys(tmp_path: Path) -> None:
    """Envoy asks replicas for the certificate of a name, passes keys on, and needs none for itself."""
    certificates = Certificates(tmp_path)
    keys, ring = keyring("infer")
    guarded = Fleet(tmp_path, Guard(ring, certificates.server))
    tls = Tls(str(tmp_path / "ours.pem"), "localhost")
    async with (
        behind_envoy(guarded, tls=tls),
        AsyncClient(guarded.proxy.grpc, api_key=keys["infer"]) as client,
    ):
        assert (await client.complete("lora1", "HELLO")).text in guarded.replicas
        headers = {"authorization": f"Bearer {keys['infer']}"}
        answer = await guarded.web.get("/v1/models", headers=headers)
        assert answer.json()["data"][0]["id"] == MODELS[0]
        assert (await guarded.web.get("/v1/models")).status_code == 401


async def test_a_certificate_of_another_name_is_no_replica(tmp_path: Path) -> None:
    """What shows a certificate for another name gets no traffic."""
    replica = ScriptedReplica(tmp_path, "one", Guard(None, Certificates(tmp_path).server))
    await replica.start()
    tls = Tls(str(tmp_path / "ours.pem"), "elsewhere.example.com")
    async with envoy_of(replica.doors, folder=tmp_path, tls=tls) as envoy:
        await asyncio.to_thread(until, lambda: envoy.counter("ssl.fail_verify_san") > 1)
        assert not envoy.healthy()
    await replica.drain()


async def test_replicas_have_names(tmp_path: Path) -> None:
    """Replicas that are given by name are found."""
    async with behind_envoy(Fleet(tmp_path), host="localhost") as made:
        assert await made.who("lora1") == await made.who_over_http("lora1")


async def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    """Envoy keeps little of an answer that nobody reads: its replica has to wait, as it would without Envoy."""
    endless = Endless(tmp_path)
    http, rpc = doors_of(endless, http=protocol.Patience(read_s=0.5), rpc=calls.Patience(read_s=0.5))
    await http.start()
    await rpc.start()
    await rpc.set_serving(True)
    body = {"model": "tiny", "prompt": "HELLO", "stream": True}
    async with (
        envoy_of((rpc.address, http.address), folder=tmp_path) as envoy,
        AsyncClient(envoy.grpc) as client,
        httpx.AsyncClient(base_url=envoy.url) as web,
        web.stream("POST", "/v1/completions", json=body),
    ):
        stream = client.generate("tiny", "HELLO")
        await anext(stream)
        assert endless.open == 2
        await endless.until(0, within_s=20)
    await asyncio.gather(http.drain(0), rpc.drain(0))
