"""The keyring and the TLS files that all servers of a service share."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

import structlog

from loramux_shared.access.keyring import Keyring
from loramux_shared.access.tls import TlsFiles
from loramux_shared.faults import SettingsInvalid
from loramux_shared.settings import Settings

log = structlog.get_logger()


@dataclass(frozen=True)
class Guard:
    """Keys and encryption of a server; None: off."""

    keyring: Keyring | None = None
    tls: TlsFiles | None = None

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
    guard = Guard(keyring, _tls_files(settings))
    public = [address for address in addresses if not is_local(address)]
    guarded = keyring is not None or (guard.tls is not None and guard.tls.client_ca is not None)
    if public and not guarded and not settings.insecure:
        raise SettingsInvalid(
            f"{' and '.join(public)} can be reached from other machines, and no key would be required. "
            "Set LORAMUX_KEYS_FILE (--keys-file; `loramux keys new` makes one) or LORAMUX_TLS_CLIENT_CA, "
            "listen on 127.0.0.1, or set LORAMUX_INSECURE=1 (--insecure)."
        )
    if public and guard.tls is None and guarded:
        log.warning("keys and answers are not encrypted: set LORAMUX_TLS_CERT and _KEY", addresses=public)
    if guard.tls:
        guard.tls.pem()
    return guard


def is_local(address: str) -> bool:
    """True for a Unix socket, and where HOST of HOST:PORT is this machine's loopback."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _tls_files(settings: Settings) -> TlsFiles | None:
    if settings.tls_cert and settings.tls_key:
        return TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    if settings.tls_cert or settings.tls_key or settings.tls_client_ca:
        raise SettingsInvalid(
            "TLS needs both LORAMUX_TLS_CERT and LORAMUX_TLS_KEY. Set both, or no TLS setting."
        )
    return None
