"""TLS from files that may change: certificates are renewed while a server runs."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog

from loramux_shared.access.watch import Watch
from loramux_shared.faults import SettingsInvalid

log = structlog.get_logger()
T = TypeVar("T")


@dataclass(frozen=True)
class Pem:
    """The contents of the TLS files, as PEM."""

    chain: bytes
    key: bytes
    client_ca: bytes | None


@dataclass(frozen=True)
class TlsFiles:
    """Paths of a server's certificate, its key and the client CA."""

    cert: Path
    """The chain, the server's own certificate first."""
    key: Path
    client_ca: Path | None = None
    """Clients must show a certificate of these authorities; None: they show none."""

    def pem(self) -> Pem:
        """Return what the files hold.

        Raises:
            SettingsInvalid: a file cannot be read, or they do not belong together.
        """
        chain, key = _bytes(self.cert), _bytes(self.key)
        client_ca = None if self.client_ca is None else _bytes(self.client_ca)
        self.context()  # gRPC would take anything, and refuse every handshake
        return Pem(chain, key, client_ca)

    def context(self) -> ssl.SSLContext:
        """Return a context of the files as they are now.

        Raises:
            SettingsInvalid: a file cannot be read, or they do not belong together.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["http/1.1"])
        try:
            # Without a password, OpenSSL would ask the terminal for that of an encrypted key.
            context.load_cert_chain(self.cert, self.key, password="")
        except (OSError, ValueError) as error:
            raise SettingsInvalid(
                f"TLS: {self.cert} and {self.key}: {_why(error)}. Expected a certificate chain and its private "
                "key as PEM, without a passphrase."
            ) from error
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except OSError as error:
                raise SettingsInvalid(
                    f"TLS: {self.client_ca}: {_why(error)}. Expected CA certificates as PEM."
                ) from error
            context.verify_mode = ssl.CERT_REQUIRED
            # A resumed session is not verified again: it would outlive the authority that let it in. Before 1.3
            # there is a cache of them that cannot be turned off here.
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.num_tickets = 0
        return context

    def follow(self, read: Callable[[], T]) -> Callable[[], T | None]:
        """Return a function that reads the files where they changed; what is no good is logged, and None."""
        watch = Watch(*filter(None, (self.cert, self.key, self.client_ca)))
        watch.changed()

        def renewed() -> T | None:
            if not watch.changed():
                return None
            try:
                newer = read()
            except SettingsInvalid as fault:
                log.warning("certificate is invalid, the previous one stays", why=fault.message)
                return None
            log.info("certificate read again", cert=str(self.cert))
            return newer

        return renewed

    def following_context(self) -> ssl.SSLContext:
        """Return a context whose handshakes use the files as they are then; broken files are not taken."""
        renewed = self.follow(self.context)
        context = newest = self.context()

        def choose(connection: ssl.SSLSocket | ssl.SSLObject, _name: str | None, _: ssl.SSLContext) -> None:
            nonlocal newest
            connection.context = newest = renewed() or newest

        context.sni_callback = choose
        return context


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsInvalid(f"TLS: {path}: {error.strerror}.") from error


def _why(error: OSError | ValueError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM").replace("_", " ").lower()
    return getattr(error, "strerror", None) or str(error)
