"""An https server with its own authority, in a thread: the faults that an address may meet."""

import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import TypeAlias

import trustme

from tests.support.http_server import QuietHandler, serve_http

Route: TypeAlias = Callable[[QuietHandler], None]


@dataclass
class Site:
    """The server's answers, and the requests that it got."""

    port: int
    ca_file: Path
    routes: dict[str, bytes | Route] = field(default_factory=dict)
    """Routes by path: a body, or a function that answers."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(Host header, path with query), in order."""
    names: list[str | None] = field(default_factory=list)
    """The names of the TLS handshakes."""
    failures: list[int] = field(default_factory=list)
    """Statuses to answer the next requests with."""


@contextmanager
def serve_https(folder: Path, *hosts: str) -> Iterator[Site]:
    """Run a server on a free port of 127.0.0.1 with a certificate for these names."""
    authority = trustme.CA()
    ca_file = folder / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*hosts).configure_cert(context)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients go away in the middle
    site = Site(server.server_port, ca_file)
    _Handler.site = site
    context.sni_callback = lambda _socket, name, _context: site.names.append(name)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    with serve_http(server):
        yield site


def redirect(to: str, status: int = 302) -> Route:
    return lambda handler: handler.answer(status, Location=to)


def body_of_length(length: int, body: bytes) -> Route:
    """A route whose Content-Length is not that of its body."""
    return lambda handler: handler.answer(200, body, **{"Content-Length": str(length)})


class _Handler(QuietHandler):
    site: Site

    def do_GET(self) -> None:  # noqa: N802 - the base class's name
        self.site.requests.append((self.headers["Host"], self.path))
        route = self.site.routes.get(self.path.partition("?")[0])
        if self.site.failures:
            self.answer(self.site.failures.pop(0))
        elif route is None:
            self.answer(404)
        elif isinstance(route, bytes):
            self.answer(200, route)
        else:
            route(self)
