"""TLS of both APIs: real handshakes, certificates that change, and refusals that name the cure."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from inference_service.api.http.server import HttpServer
from loramux import AsyncClient, Client
from loramux_shared.access.guard import Guard, TlsFiles
from loramux_shared.faults import ServerUnavailable, SettingsInvalid, Unauthenticated
from loramux_shared.rpc.server import RpcServer
from tests.support.access import NOBODY, Certificates, keyring
from tests.support.grpc_api import inference_rpc
from tests.support.services.silent import MODELS, silent_service
from tests.support.waiting import BOUND_S

KEYS, RING = keyring("infer")


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    """Authorities, and a server's certificate of ours."""
    return Certificates(tmp_path)


class GuardedApis:
    """The APIs of one service, with the files of a guard."""

    def __init__(self, folder: Path, guard: Guard, certificates: Certificates) -> None:
        self.certificates = certificates
        service = silent_service(folder)
        self.grpc: RpcServer = inference_rpc(service, guard)
        self.http = HttpServer("127.0.0.1:0", service, guard)

    async def ask(self, **fields: Any) -> list[str]:
        """The models, asked over gRPC by a client that trusts our authority unless the fields say otherwise."""
        options = NOBODY | {"tls_ca": self.certificates.folder / "ours.pem"} | fields
        async with AsyncClient(f"grpcs://{self.grpc.address}", timeout_s=BOUND_S, **options) as client:
            return [model.name for model in await client.models()]

    async def browse(self, key: str | None = None, **fields: Path) -> list[str]:
        """The same over HTTP."""
        context = ssl.create_default_context(cafile=fields.get("tls_ca", self.certificates.folder / "ours.pem"))
        if "client_cert" in fields:
            context.load_cert_chain(fields["client_cert"], fields["client_key"])
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(verify=context, headers=headers, trust_env=False, timeout=BOUND_S) as web:
            answer = await web.get(f"https://{self.http.address}/v1/models")
        return [model["id"] for model in answer.json()["data"]]


@pytest.fixture
async def open_apis(tmp_path: Path, certificates: Certificates) -> AsyncIterator[Any]:
    """A function that opens both APIs with a guard."""
    opened: list[GuardedApis] = []

    async def open_them(guard: Guard) -> GuardedApis:
        apis = GuardedApis(tmp_path, guard, certificates)
        opened.append(apis)
        await apis.grpc.start()
        await apis.grpc.set_serving(True)
        await apis.http.start()
        return apis

    yield open_them
    for apis in opened:
        await apis.http.drain(BOUND_S)
        await apis.grpc.drain(BOUND_S)


async def refusal(apis: GuardedApis, **fields: Any) -> str:
    with pytest.raises(ServerUnavailable) as caught:
        await apis.ask(**fields)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"no answer from grpcs://{apis.grpc.address}: ")
    return str(caught.value)


async def test_a_certificate_of_another_authority(open_apis: Any, certificates: Certificates) -> None:
    """A client refuses a server of an untrusted authority; the line names the setting for a CA file."""
    apis = await open_apis(Guard(None, certificates.server))
    for ca in (certificates.folder / "other.pem", None):
        message = await refusal(apis, tls_ca=ca)
        assert message.endswith(
            "its certificate is not signed by an authority that is trusted here. Name the file of the right "
            "one: LORAMUX_TLS_CA=ca.pem."
        )
    with pytest.raises(httpx.ConnectError):
        await apis.browse(tls_ca=certificates.folder / "other.pem")


async def test_a_certificate_that_expired_or_is_for_another_name(
    open_apis: Any, certificates: Certificates
) -> None:
    """An old certificate and one for another host are refused by their causes."""
    apis = await open_apis(Guard(None, certificates.server))
    yesterday = datetime.now(UTC) - timedelta(days=1)
    certificates.issue(
        "server", certificates.ours, not_before=yesterday - timedelta(days=1), not_after=yesterday
    )
    assert "its certificate has expired. Renew it there" in await refusal(apis)
    certificates.issue("server", certificates.ours, "models.example.com")
    assert "its certificate is for other names." in await refusal(apis)


async def test_a_client_in_the_clear_and_a_server_in_the_clear(
    open_apis: Any, certificates: Certificates
) -> None:
    """A client learns that it speaks TLS to a server in the clear, or the other way round."""
    apis = await open_apis(Guard(None, certificates.server))
    async with AsyncClient(apis.grpc.address, timeout_s=BOUND_S, **NOBODY) as client:
        with pytest.raises(ServerUnavailable, match=f"its address is grpcs://{apis.grpc.address}"):
            await client.models()
    plain = await open_apis(Guard())
    assert "it does not speak TLS. Leave grpcs:// out" in await refusal(plain)


async def test_certificates_are_renewed_while_it_runs(open_apis: Any, certificates: Certificates) -> None:
    """The next connection after a change gets the new certificate, over both APIs; no restart."""
    apis = await open_apis(Guard(None, certificates.server))
    assert await apis.ask() == await apis.browse() == list(MODELS)
    certificates.issue("server", certificates.other)
    other = certificates.folder / "other.pem"
    assert await apis.ask(tls_ca=other) == await apis.browse(tls_ca=other) == list(MODELS)
    await refusal(apis)


async def test_a_broken_certificate_is_not_taken(open_apis: Any, certificates: Certificates) -> None:
    """A key that does not fit the certificate, as in the middle of a renewal, leaves the old pair in use."""
    apis = await open_apis(Guard(None, certificates.server))
    certificates.server.key.write_bytes(certificates.issue("client", certificates.other).key.read_bytes())
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            assert await apis.ask() == await apis.browse() == list(MODELS)
    assert [each["log_level"] for each in logs] == ["warning"] * 2  # each API looks for itself
    assert all(str(certificates.server.key) in each["why"] for each in logs)
    certificates.issue("server", certificates.other)
    assert await apis.ask(tls_ca=certificates.folder / "other.pem") == list(MODELS)


async def test_the_client_authority_is_renewed_too(open_apis: Any, certificates: Certificates) -> None:
    """A change of the client CA lets in clients of the new CA, and refuses clients of the old one."""
    apis = await open_apis(Guard(None, certificates.mutual))
    ours = certificates.client(certificates.ours)
    (certificates.folder / "other.pem").write_bytes(certificates.ours.cert_pem.bytes())
    assert await apis.ask(**ours) == await apis.browse(**ours) == list(MODELS)
    old = certificates.client(certificates.other)
    await refusal(apis, **old)
    with pytest.raises(httpx.TransportError):
        await apis.browse(**old)


def _get(address: str, context: ssl.SSLContext, session: ssl.SSLSession | None) -> ssl.SSLSession | None:
    host, port = address.split(":")
    with (
        socket.create_connection((host, int(port)), BOUND_S) as raw,
        context.wrap_socket(raw, server_hostname=host, session=session) as tls,
    ):
        tls.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        assert tls.recv(12) == b"HTTP/1.1 200"
        return tls.session


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_session_does_not_outlive_its_authority(
    version: ssl.TLSVersion, open_apis: Any, certificates: Certificates
) -> None:
    """A client of an authority that was removed cannot resume an earlier TLS session."""
    apis = await open_apis(Guard(None, certificates.mutual))
    context = ssl.create_default_context(cafile=certificates.folder / "ours.pem")
    context.maximum_version = version
    files = certificates.client(certificates.other)
    context.load_cert_chain(files["client_cert"], files["client_key"])
    try:
        session = await asyncio.to_thread(_get, apis.http.address, context, None)
    except ssl.SSLError:
        assert version is ssl.TLSVersion.TLSv1_2
        return
    (certificates.folder / "other.pem").write_bytes(certificates.ours.cert_pem.bytes())
    with pytest.raises((OSError, AssertionError)):
        await asyncio.to_thread(_get, apis.http.address, context, session)


def _encrypt(files: TlsFiles) -> None:
    from cryptography.hazmat.primitives import serialization as form

    key = form.load_pem_private_key(files.key.read_bytes(), None)
    secret = form.BestAvailableEncryption(b"passphrase")
    files.key.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, secret))


@pytest.mark.parametrize(
    "damage", ["no cert", "no key", "junk", "another key", "passphrase", "no ca", "bad ca"]
)
def test_bad_files_stop_the_start(damage: str, certificates: Certificates) -> None:
    """A server does not start with files that cannot work; the refusal names them and asks nothing."""
    files = certificates.mutual
    {
        "no cert": lambda: files.cert.unlink(),
        "no key": lambda: files.key.unlink(),
        "junk": lambda: files.key.write_text("junk"),
        "another key": lambda: certificates.issue("client", certificates.ours).key.replace(files.key),
        "passphrase": lambda: _encrypt(files),
        "no ca": lambda: (certificates.folder / "other.pem").unlink(),
        "bad ca": lambda: (certificates.folder / "other.pem").write_text("junk"),
    }[damage]()
    for read in (files.pem, files.context):
        with pytest.raises(SettingsInvalid, match=str(certificates.folder)) as caught:
            read()
        assert "\n" not in str(caught.value)


async def test_a_client_reads_its_environment(
    open_apis: Any, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client without arguments takes key and files from LORAMUX_* variables; None turns one off."""
    apis = await open_apis(Guard(RING, certificates.mutual))
    files = certificates.client(certificates.other)
    monkeypatch.setenv("LORAMUX_API_KEY", KEYS["infer"])
    monkeypatch.setenv("LORAMUX_TLS_CA", str(certificates.folder / "ours.pem"))
    monkeypatch.setenv("LORAMUX_CLIENT_CERT", str(files["client_cert"]))
    monkeypatch.setenv("LORAMUX_CLIENT_KEY", str(files["client_key"]))
    address = f"grpcs://{apis.grpc.address}"
    async with AsyncClient(address) as client:
        assert [model.name for model in await client.models()] == list(MODELS)
    async with AsyncClient(address, api_key=None) as client:
        with pytest.raises(Unauthenticated):
            await client.models()


def test_what_a_client_cannot_use(certificates: Certificates) -> None:
    """A missing file, half a pair and a key with a line break are refused before anything is sent."""
    for fields, stated in (
        ({"tls_ca": certificates.folder / "none"}, "none: No such file"),
        ({"client_cert": certificates.server.cert}, "LORAMUX_CLIENT_CERT and _KEY"),
        ({"api_key": "lmx_a\nb"}, "characters that are not allowed in a key"),
    ):
        with (
            Client("grpcs://127.0.0.1:1", **(NOBODY | fields)) as client,
            pytest.raises(SettingsInvalid, match=stated),
        ):
            client.models()


def test_a_key_is_not_shown(certificates: Certificates) -> None:
    """A client's credentials do not show the key."""
    assert "lmx_" not in repr(certificates.credentials(api_key="lmx_secret"))
