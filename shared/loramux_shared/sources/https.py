"""Downloads over https that reach no address but a checked one, redirects included."""

import re
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from http.client import HTTPException, HTTPResponse, HTTPSConnection
from typing import Final
from urllib.parse import SplitResult, urljoin, urlsplit

from loramux_shared.adapter_files import PIECE
from loramux_shared.faults import Fault, RepoGated, RepoNotFound, SourceRefused, SourceUnavailable
from loramux_shared.sources.public import Address, AddressGuard
from loramux_shared.sources.retry import Busy, TimeLeft
from loramux_shared.wording import is_whole

TIMEOUT_S: Final = 20.0
MAX_REDIRECTS: Final = 5
_PORT: Final = 443
# Characters that http.client sends unchanged: no spaces, no control characters, ASCII only.
_PLAIN: Final = re.compile(r"[!-~]+")


class PinnedConnection(HTTPSConnection):
    """Connects to one address; the certificate and the Host header are those of the name."""

    def __init__(self, host: str, port: int, address: Address, context: ssl.SSLContext) -> None:
        super().__init__(host, port, timeout=TIMEOUT_S, context=context)
        self._pinned = (str(address), port)
        self._tls = context

    def connect(self) -> None:
        """Open the connection; no name is looked up."""
        plain = socket.create_connection(self._pinned, TIMEOUT_S)
        try:
            self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise


class Challenged(RepoGated):
    """The server that an address names wants authorization, in the way that its challenge says."""

    challenge = ""


class Download:
    """A response with its status checked."""

    def __init__(self, response: HTTPResponse, name: str) -> None:
        self._response = response
        self._name = name
        length = response.headers.get("Content-Length", "")
        self.size = int(length) if is_whole(length) else None

    def pieces(self) -> Iterator[bytes]:
        """Yield the body as it is sent; raise `SourceUnavailable` where it breaks off."""
        received = 0
        while piece := self._response.read1(PIECE):
            received += len(piece)
            yield piece
        if self.size is not None and received != self.size:
            raise SourceUnavailable(f"{self._name}: expected {self.size} bytes, found {received}. Retry.")


class Https:
    """Opens addresses of clients. Proxies are not used: they would look names up themselves."""

    def __init__(self, guard: AddressGuard) -> None:
        self._guard = guard

    @cached_property
    def _context(self) -> ssl.SSLContext:
        """Made for the first address: all authorities are read from files, of which most starts need none.

        SSL_CERT_FILE and SSL_CERT_DIR are OpenSSL's own variables.
        """
        return ssl.create_default_context()

    @contextmanager
    def get(
        self, url: str, deadline: TimeLeft, authorization: tuple[str, str] | None = None, *, accept: str = "*/*"
    ) -> Iterator[Download]:
        """Yield what an address or a redirect of it answers; authorization is (host, header).

        Behind a redirect to another host or port, no authorization is sent, and no challenge counts.

        Raises:
            SourceRefused: an address on the way may not be reached.
            RepoNotFound, RepoGated, SourceUnavailable: what the last one answers.
        """
        parts, away = split_address(url), False
        for _ in range(MAX_REDIRECTS + 1):
            name = without_query(parts)
            host, port = _origin(parts)
            headers = {"Accept-Encoding": "identity", "User-Agent": "loramux", "Accept": accept}
            if authorization and not away and authorization[0] in {host, f"{host}:{port}"}:
                headers["Authorization"] = printable(authorization[1], name)
            with _translated(name), self._request(parts, headers, deadline) as response:
                if response.status in {301, 302, 303, 307, 308}:
                    parts = split_address(response.headers.get("Location", ""), parts.geturl())
                    away = away or _origin(parts) != (host, port)
                    continue
                if response.status != 200:
                    raise _answered(response, name, away=away)
                yield Download(response, name)
                return
        raise SourceRefused(f"{without_query(parts)}: more than {MAX_REDIRECTS} redirects")

    @contextmanager
    def _request(
        self, parts: SplitResult, headers: dict[str, str], deadline: TimeLeft
    ) -> Iterator[HTTPResponse]:
        """Yield the response of the first address that can be connected to."""
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        with closing(self._connect(*_origin(parts))) as connection:
            with _ended_after(deadline.left_s, connection):
                connection.request("GET", target, headers=headers)
                response = connection.getresponse()
            with response:
                yield response

    def _connect(self, host: str, port: int) -> PinnedConnection:
        failure: OSError | None = None
        for address in self._guard.addresses(host, port)[:4]:
            connection = PinnedConnection(host, port, address, self._context)
            try:
                connection.connect()
            except OSError as error:
                failure = error
            else:
                return connection
        raise failure or OSError


def printable(header: str, name: str) -> str:
    """Return a header that holds a secret, or raise `SourceRefused` where none may have its characters."""
    if not re.fullmatch(r"[ -~]+", header):
        raise SourceRefused(f"{name}: expected printable ASCII in what authorizes, found other characters")
    return header


def split_address(url: str, base: str = "") -> SplitResult:
    """Return the parts of an https address, which may be relative to another, or raise `SourceRefused`."""
    try:
        url = urljoin(base, url)
        parts = urlsplit(url)
        plain = bool(parts.hostname) and parts.port != 0 and bool(_PLAIN.fullmatch(url))
    except ValueError:
        raise SourceRefused("REMOTE_URL: not a valid address") from None
    if parts.scheme != "https" or not plain:
        raise SourceRefused(f"REMOTE_URL {without_query(parts)}: expected https://HOST/PATH, percent-encoded")
    if parts.username is not None or parts.password is not None:
        raise SourceRefused(f"REMOTE_URL {without_query(parts)}: a name or password in an address is refused")
    return parts


def _origin(parts: SplitResult) -> tuple[str, int]:
    return str(parts.hostname), parts.port or _PORT


def without_query(parts: SplitResult) -> str:
    """Return an address for a message: without query, fragment, name and password."""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@contextmanager
def _ended_after(seconds: float, connection: PinnedConnection) -> Iterator[None]:
    """Shut a connection that still waits for headers then: a socket's timeout starts again with each byte.

    :raises TimeoutError: when it did, though headers that end there may look whole.
    """
    over = threading.Event()

    def end() -> None:
        over.set()
        try:
            connection.sock.shutdown(socket.SHUT_RDWR)
        except (OSError, AttributeError):  # closed already
            return

    timer = threading.Timer(max(0.0, seconds), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if over.is_set():
        raise TimeoutError


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """Turn failures into ours; texts of others may hold the whole address, and are not repeated."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise SourceRefused(
            f"REMOTE_URL {name}: its certificate is not trusted ({error.verify_message}). "
            "A private authority is named by SSL_CERT_FILE."
        ) from None
    except (OSError, HTTPException) as error:
        raise SourceUnavailable(
            f"REMOTE_URL {name}: the transfer was not complete ({type(error).__name__})"
        ) from None


def _answered(response: HTTPResponse, name: str, *, away: bool) -> Fault:
    status = response.status
    if status in {404, 410}:
        return RepoNotFound(f"REMOTE_URL {name}: not found ({status}). Correct the address.")
    if status in {400, 401, 403}:
        message = f"REMOTE_URL {name}: refused ({status}). Signed addresses expire: make a new one."
        if away:
            return RepoGated(message)
        gated = Challenged(message)
        gated.challenge = response.headers.get("WWW-Authenticate", "")
        return gated
    message = f"REMOTE_URL {name}: answered with status {status}"
    if status in {408, 425, 429} or status >= 500:
        return Busy.until(message, response.headers.get("Retry-After"))
    return SourceRefused(message)
