"""Pages of other sites, also of names that resolve to this machine, reach no server without keys."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from inference_service.api.http.app import ENDPOINTS
from inference_service.api.http.server import HttpServer
from loramux_shared.access.guard import Guard
from tests.support.access import keyring
from tests.support.servers import ANY_PORT, serve
from tests.support.services.silent import silent_service
from tests.support.waiting import BOUND_S

EVIL = (
    "evil.example",
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "10.0.0.1",
    "[::2]",
)


@asynccontextmanager
async def opened(folder: Path, guard: Guard, address: str = ANY_PORT) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that has these guards."""
    async with serve(HttpServer(address, silent_service(folder), guard)) as server:
        port = server.address.rpartition(":")[2]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=BOUND_S) as client:
            yield client


async def test_no_route_is_open_to_another_site(tmp_path: Path) -> None:
    """Every route refuses a foreign Host before it reads a body, in the words of its API."""
    async with opened(tmp_path, Guard()) as client:
        for each in (each for each in ENDPOINTS if each.path not in ("/health", "/ping")):
            answer = await client.request(each.method, each.path, headers={"host": "evil.example"}, json={})
            assert answer.status_code == 403, each.path
            assert "LORAMUX_HTTP_HOSTS" in answer.json()["error"]["message"], each.path
        assert answer.json()["error"]["code"] == "host_refused"


async def test_health_is_told_to_every_name(tmp_path: Path) -> None:
    """A proxy that asks for health by a name of its own is answered: Envoy's is the cluster's."""
    async with opened(tmp_path, Guard()) as client:
        for path in ("/health", "/ping"):
            assert (await client.get(path, headers={"host": "replicas_http"})).status_code != 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        *(({"host": host}, 403) for host in EVIL),
        *(({"origin": f"http://{host}"}, 403) for host in EVIL),
        ({"origin": "null"}, 403),
        ({"host": "evil.example", "origin": "http://localhost:8000"}, 403),
        *(
            ({"host": host}, 200)
            for host in ("localhost", "LocalHost:8000", "127.0.0.1:1", "127.9.9.9", "[::1]:8000")
        ),
        ({"origin": "http://localhost:3000"}, 200),
        ({"origin": "http://127.0.0.1:3000", "sec-fetch-site": "same-site"}, 200),
        ({"host": "models.example", "origin": "https://models.example"}, 200),
        ({"host": "models.example:8443"}, 200),
        ({"host": "one.example:1"}, 200),
        ({"host": "one.example:2"}, 403),
        ({"host": ""}, 200),
    ],
)
async def test_loopback_and_named_hosts_are_open(headers: dict[str, str], status: int, tmp_path: Path) -> None:
    """A name of the settings counts with every port, unless it has one itself; so does an Origin."""
    async with opened(tmp_path, Guard(hosts=("models.example", "one.example:1"))) as client:
        assert (await client.get("/v1/models", headers=headers)).status_code == status


@pytest.mark.parametrize(
    ("address", "hosts", "status"), [("0.0.0.0:0", (), 200), ("0.0.0.0:0", ("a.example",), 403)]
)
async def test_names_of_other_addresses_are_known_where_they_are_set(
    address: str, hosts: tuple[str, ...], status: int, tmp_path: Path
) -> None:
    """A container listens on all addresses, and nobody told it its name."""
    async with opened(tmp_path, Guard(hosts=hosts), address) as client:
        assert (await client.get("/v1/models", headers={"host": "b.example"})).status_code == status


async def test_a_key_is_enough_under_any_name(tmp_path: Path) -> None:
    """A page of another site has no key of this server."""
    keys, ring = keyring("infer")
    async with opened(tmp_path, Guard(ring)) as client:
        headers = {"host": "proxy.example", "authorization": f"Bearer {keys['infer']}"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
