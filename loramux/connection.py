"""The connection of a client to a service: addresses, keys, TLS.

An address is ``HOST:PORT``, a list of them, or ``dns:///NAME:PORT``, a name that stands for many replicas; each
with ``grpcs://`` before it where it has TLS. Values that are not given come from the environment:
``LORAMUX_API_KEY``, ``LORAMUX_TLS_CA``, ``LORAMUX_CLIENT_CERT`` and ``LORAMUX_CLIENT_KEY``.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypedDict

import grpc
from google.protobuf.message import Message

from loramux_shared.access import API_KEY
from loramux_shared.adapter_files import read_small
from loramux_shared.faults import RequestInvalid, SettingsInvalid
from loramux_shared.routes import MODEL_HEADER, OF_A_MODEL
from loramux_shared.rpc.options import CLIENT_OPTIONS, MAX_REQUEST_BYTES
from loramux_shared.rpc.status import fault_of
from loramux_shared.wording import is_whole

TLS_SCHEME: Final = "grpcs://"
DNS_SCHEME: Final = "dns:///"
EXPECTED: Final = "expected HOST:PORT, a list of them, or dns:///NAME:PORT; with TLS, grpcs:// before each"


@dataclass(frozen=True)
class Address:
    """The address of one replica."""

    target: str
    """``HOST:PORT``, with ``grpcs://`` before it where it has TLS."""
    name: str = ""
    """Name that its certificate must have, where it was found by one."""


def split(words: str) -> tuple[str, ...]:
    """Return the parts of a list of addresses, each once; raise SettingsInvalid where one has no port."""
    parts = tuple(dict.fromkeys(each.strip() for each in words.split(",") if each.strip()))
    for each in parts or ("nothing",):
        host, _, port = each.removeprefix(TLS_SCHEME).removeprefix(DNS_SCHEME).rpartition(":")
        if not host or not is_whole(port) or "/" in host or int(port) > 65535:
            raise SettingsInvalid(f"{each}: {EXPECTED}.")
    return parts


def is_many(words: str) -> bool:
    """Return True if there may be several replicas behind these words."""
    return "," in words or is_name(words)


def is_name(part: str) -> bool:
    """Return True for a name that is looked up."""
    return part.removeprefix(TLS_SCHEME).startswith(DNS_SCHEME)


def look_up(part: str) -> tuple[Address, ...]:
    """Return the replicas behind one part; raise SettingsInvalid where its name does not resolve."""
    scheme = TLS_SCHEME if part.startswith(TLS_SCHEME) else ""
    rest = part.removeprefix(TLS_SCHEME)
    if not rest.startswith(DNS_SCHEME):
        return (Address(part),)
    host, _, port = rest.removeprefix(DNS_SCHEME).rpartition(":")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise SettingsInvalid(f"{part}: expected dns:///NAME:PORT of a name that resolves.") from None
    hosts = dict.fromkeys(str(address[4][0]) for address in found)
    name = host if scheme else ""
    bracketed = (f"[{each}]" if ":" in each else each for each in hosts)
    return tuple(Address(f"{scheme}{each}:{port}", name) for each in bracketed)


def resolve(words: str) -> tuple[Address, ...]:
    """Return the replicas behind a list, each once, or raise what `split` and `look_up` do."""
    found = (address for part in split(words) for address in look_up(part))
    return tuple({each.target: each for each in found}.values())


GENERATE: Final = "Generate"
MAX_HEADER: Final = 256


class CredentialOptions(TypedDict, total=False):
    """The fields of `Credentials`, as keywords of a client; None: nothing, whatever the environment says."""

    api_key: str | None
    tls_ca: str | Path | None
    client_cert: str | Path | None
    client_key: str | Path | None
    tls_name: str | None


def _variable(name: str) -> Callable[[], str | None]:
    return lambda: os.environ.get(name, "").strip() or None


@dataclass(frozen=True)
class Credentials:
    """The credentials of a client, and the authorities that it trusts."""

    api_key: str | None = field(default_factory=_variable(API_KEY), repr=False)
    tls_ca: str | Path | None = field(default_factory=_variable("LORAMUX_TLS_CA"))
    """A file of authorities (PEM); None: those that gRPC brings."""
    client_cert: str | Path | None = field(default_factory=_variable("LORAMUX_CLIENT_CERT"))
    """A certificate chain (PEM), where the server asks clients for one."""
    client_key: str | Path | None = field(default_factory=_variable("LORAMUX_CLIENT_KEY"))
    tls_name: str | None = None
    """Name that the server's certificate is for; None: its address."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata of every call; raise SettingsInvalid where no key has such characters."""
        if self.api_key is None:
            return ()
        if not self.api_key.isascii() or not self.api_key.isprintable():
            raise SettingsInvalid("the API key has characters that are not allowed in a key. Copy it again.")
        return (("authorization", f"Bearer {self.api_key}"),)

    def channel(self, address: str, kind: Any = grpc, options: tuple[tuple[str, str | int], ...] = ()) -> Any:
        """Return a channel; kind is ``grpc`` or ``grpc.aio``, options come before the usual ones.

        Raises:
            SettingsInvalid: a file of TLS cannot be read, or the address is one of HTTP or has no port.
        """
        target = address.removeprefix(TLS_SCHEME)
        if address.startswith(("http://", "https://")) or ":" not in target:
            raise SettingsInvalid(f"{address}: expected HOST:PORT of a gRPC server, or {TLS_SCHEME}HOST:PORT.")
        if target == address:
            return kind.insecure_channel(address, (*options, *CLIENT_OPTIONS))
        name = (("grpc.ssl_target_name_override", self.tls_name),) if self.tls_name else ()
        return kind.secure_channel(target, self._tls(), (*options, *name, *CLIENT_OPTIONS))

    def _tls(self) -> Any:
        if (self.client_cert is None) != (self.client_key is None):
            raise SettingsInvalid("a client's certificate needs its key: LORAMUX_CLIENT_CERT and _KEY.")
        ca, key, cert = (
            None if path is None else _read(Path(path))
            for path in (self.tls_ca, self.client_key, self.client_cert)
        )
        return grpc.ssl_channel_credentials(ca, key, cert)


class Calls:
    """The methods of a stub: each call carries the key and its model, and is no larger than a server takes."""

    def __init__(self, stub: Any, credentials: Credentials) -> None:
        self._stub = stub
        self._metadata = credentials.metadata

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._stub, name)

        def call(request: Any, timeout: float | None = None) -> Any:
            size = request.ByteSize() if isinstance(request, Message) else 0  # otherwise a stream of messages
            if size > MAX_REQUEST_BYTES:
                raise RequestInvalid(
                    f"the request has {size} bytes; a server takes at most {MAX_REQUEST_BYTES}. Send less."
                )
            model = _model_header(request.model) if name in OF_A_MODEL else ()
            return method(request, timeout=timeout, metadata=(*self._metadata, *model))

        return call

    def begin(self, name: str, messages: Iterator[Any], timeout_s: float | None) -> Any:
        """Begin a call that sends a stream of messages, on a channel for threads; returns its future."""
        return getattr(self._stub, name).future(messages, timeout=timeout_s, metadata=self._metadata)


def _model_header(model: str) -> tuple[tuple[str, str], ...]:
    """Return the header for a name; none for what no header may hold, and no model is called."""
    fits = len(model) <= MAX_HEADER and model.isascii() and model.isprintable()
    return ((MODEL_HEADER, model),) if fits else ()


@contextmanager
def named(target: str) -> Iterator[None]:
    """Turn what grpc raises into a named fault."""
    try:
        yield
    except grpc.RpcError as error:
        raise fault_of(error, target) from error


def _read(path: Path) -> bytes:
    try:
        return read_small(path.expanduser())
    except OSError as error:
        raise SettingsInvalid(f"TLS: {path}: {error.strerror}.") from error
