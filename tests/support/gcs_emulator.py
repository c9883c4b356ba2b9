"""Google Cloud Storage for tests: the emulator's handlers behind a token endpoint and preconditions."""

import base64
import functools
import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

from tests.support.http_server import serve_http
from tests.support.waiting import BOUND_S

TOKEN = "ya29.a-token-of-the-emulator"  # noqa: S105 - of the emulator
_JSON = "application/json"


@dataclass
class Gcs:
    """The address of the server, and a service account that may enter."""

    endpoint: str
    storage: Storage
    account: dict[str, str] = field(default_factory=dict)
    failures: list[int] = field(default_factory=list)
    """Statuses to answer the next requests with."""

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Store an object, which gets a new generation."""
        url = f"{self.endpoint}/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(key, safe='')}"
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/octet-stream"}
        request = urllib.request.Request(url, data, headers)  # noqa: S310 - http
        urllib.request.urlopen(request, timeout=BOUND_S).close()  # noqa: S310 - http


@contextmanager
def serve_gcs(bucket: str) -> Iterator[Gcs]:
    """Run an emulator with one bucket on a free port, in memory."""
    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(bucket, storage)
    gcs = Gcs("", storage)
    handler = type("Handler", (_Handler,), {"gcs": gcs, "storage": storage})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    gcs.endpoint = f"http://127.0.0.1:{server.server_port}"
    gcs.account = _account(gcs.endpoint)
    with serve_http(server):
        yield gcs


class _Handler(RequestHandler):  # type: ignore[misc,unused-ignore]  # the emulator has no types
    gcs: Gcs

    def __init__(self, *args: Any) -> None:
        super().__init__(self.gcs.storage, *args)

    def do_GET(self) -> None:  # noqa: N802 - the base class's name
        if self._refusal() is None:
            super().do_GET()

    def do_POST(self) -> None:  # noqa: N802 - the base class's name
        if self.path == "/token":
            known = self.gcs.account["private_key_id"] in _key_id(self._body())
            answer = {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}
            self._answer(200 if known else 400, answer if known else {"error": "invalid_grant"})
        elif self._refusal() is None:
            super().do_POST()

    def _refusal(self) -> int | None:
        """Check the request in places where the emulator is lax, and return the status."""
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        status = None
        if self.gcs.failures:
            status = self.gcs.failures.pop(0)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401
        elif "ifGenerationMatch" in query:
            parts = urlsplit(self.path).path.split("/")
            found = self.gcs.storage.get_file_obj(parts[4], unquote(parts[6]))
            status = None if found["generation"] == query["ifGenerationMatch"] else 412
        if status is not None:
            self._answer(status, {"error": {"code": status}})
        return status

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", _JSON)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _key_id(form: bytes) -> str:
    """Return the id of the key with which an assertion says that it is signed."""
    header = parse_qs(form.decode())["assertion"][0].partition(".")[0]
    return str(json.loads(base64.urlsafe_b64decode(header + "=="))["kid"])


@functools.cache
def _private_key() -> str:
    key = rsa.generate_private_key(65537, 2048)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def _account(endpoint: str) -> dict[str, str]:
    return {
        "type": "service_account",
        "client_email": "loramux@tests.iam.gserviceaccount.com",
        "private_key_id": "canary-key-id",
        "private_key": _private_key(),
        "token_uri": f"{endpoint}/token",
    }
