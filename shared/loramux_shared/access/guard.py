"""The keyring and the TLS files of a service's servers; certificates are renewed while a server runs."""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog

from loramux_shared.access.hosts import is_loopback
from loramux_shared.access.keyring import Keyring, Watch
from loramux_shared.adapter_files import read_small
from loramux_shared.faults import SettingsInvalid
from loramux_shared.settings import Settings

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
        """Return what the files hold; raise SettingsInvalid for one that is unreadable, or does not fit."""
        chain, key = _bytes(self.cert), _bytes(self.key)
        client_ca = None if self.client_ca is None else _bytes(self.client_ca)
        self.context()  # gRPC would take anything, and refuse every handshake
        return Pem(chain, key, client_ca)

    def context(self) -> ssl.SSLContext:
        """Return a context of the files as they are now, or raise what `pem` does."""
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
        return read_small(path)
    except OSError as error:
        raise SettingsInvalid(f"TLS: {path}: {error.strerror}.") from error


def _why(error: OSError | ValueError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM").replace("_", " ").lower()
    return getattr(error, "strerror", None) or str(error)


log = structlog.get_logger()


@dataclass(frozen=True)
class Guard:
    """Keys and encryption of a server; None: off."""

    keyring: Keyring | None = None
    tls: TlsFiles | None = None
    hosts: tuple[str, ...] = ()
    """Names of the server beside loopback's."""

    @property
    def asks(self) -> bool:
        """True where each client must show a key or a certificate."""
        return self.keyring is not None or (self.tls is not None and self.tls.client_ca is not None)

    def hosts_at(self, address: str) -> tuple[str, ...] | None:
        """Return the names, beside loopback's, under which HTTP is answered at an address; None: any name.

        On an address that other machines reach nobody knows the names, unless they are set; browsers reach no
        Unix socket.
        """
        named = self.hosts or (is_local(address) and not address.startswith("unix:"))
        return self.hosts if named and not self.asks else None

    @property
    def label(self) -> str:
        """Return what a caller needs, for the start line: ``API keys, TLS``."""
        client_ca = self.tls is not None and self.tls.client_ca is not None
        parts = {"API keys": self.keyring is not None, "TLS": self.tls is not None, "client CA": client_ca}
        return ", ".join(name for name, on in parts.items() if on) or "nobody"


NOBODY_GUARDS = Guard()


def open_guard(settings: Settings, *addresses: str) -> Guard:
    """Return the guard of a service that listens on addresses.

    Raises:
        SettingsInvalid: a file is broken, or an address is reached from elsewhere and nobody would be asked.
    """
    lines = settings.api_keys.get_secret_value()
    keyring = Keyring(settings.keys_file, lines) if settings.keys_file or lines.strip() else None
    guard = Guard(keyring, _tls_files(settings), settings.http_hosts)
    public = [address for address in addresses if not is_local(address)]
    if public and not guard.asks and not settings.insecure:
        raise SettingsInvalid(
            f"{' and '.join(public)} can be reached from other machines, and no key would be required. "
            "Set LORAMUX_KEYS_FILE (--keys-file; `loramux keys new` makes one) or LORAMUX_TLS_CLIENT_CA, "
            "listen on 127.0.0.1, or set LORAMUX_INSECURE=1 (--insecure)."
        )
    if public and guard.tls is None and guard.asks:
        log.warning("keys and answers are not encrypted: set LORAMUX_TLS_CERT and _KEY", addresses=public)
    if guard.tls:
        guard.tls.pem()
    return guard


def is_local(address: str) -> bool:
    """True for a Unix socket, and where HOST of HOST:PORT is this machine's loopback."""
    if address.startswith("unix:"):
        return True
    return is_loopback(address.rpartition(":")[0])


def _tls_files(settings: Settings) -> TlsFiles | None:
    if settings.tls_cert and settings.tls_key:
        return TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    if settings.tls_cert or settings.tls_key or settings.tls_client_ca:
        raise SettingsInvalid(
            "TLS needs both LORAMUX_TLS_CERT and LORAMUX_TLS_KEY. Set both, or no TLS setting."
        )
    return None
