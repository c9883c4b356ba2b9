"""Keys and certificates for tests."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trustme

from loramux.connection import Credentials
from loramux_shared.access.guard import TlsFiles
from loramux_shared.access.keyring import Keyring
from loramux_shared.access.keys import KeyEntry, digest, new_key

NOBODY: dict[str, Any] = {"api_key": None, "tls_ca": None, "client_cert": None, "client_key": None}
"""Explicit options that replace those of the environment."""


def new_entry(key_id: str, *scopes: str, models: tuple[str, ...] | None = None) -> tuple[str, KeyEntry]:
    """A random key and its stored line."""
    key = new_key()
    fields = {"id": key_id, "sha256": digest(key).hex(), "scopes": scopes, "models": models}
    return key, KeyEntry.model_validate(fields)


def lines(*entries: KeyEntry) -> str:
    return "".join(f"{entry.line()}\n" for entry in entries)


def keyring(*scopes: str) -> tuple[dict[str, str], Keyring]:
    """Return a key for each of the scopes, by scope, and the keyring that takes them."""
    made = {scope: new_entry(f"for-{scope}", scope) for scope in scopes}
    ring = Keyring(text=lines(*(entry for _, entry in made.values())))
    return {scope: key for scope, (key, _) in made.items()}, ring


@dataclass
class Certificates:
    """Two authorities, and the files of a server and of a client."""

    folder: Path
    ours: trustme.CA = field(default_factory=trustme.CA)
    other: trustme.CA = field(default_factory=trustme.CA)

    def __post_init__(self) -> None:
        for name, authority in (("ours", self.ours), ("other", self.other)):
            authority.cert_pem.write_to_path(str(self.folder / f"{name}.pem"))
        self.issue("server", self.ours)

    def issue(self, stem: str, authority: trustme.CA, *names: str, **validity: Any) -> TlsFiles:
        """Write a certificate for names (default: loopback) and its key, over older files."""
        leaf = authority.issue_cert(*(names or ("127.0.0.1", "localhost")), **validity)
        files = TlsFiles(self.folder / f"{stem}.pem", self.folder / f"{stem}.key")
        files.key.write_bytes(leaf.private_key_pem.bytes())
        files.cert.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        return files

    @property
    def server(self) -> TlsFiles:
        return TlsFiles(self.folder / "server.pem", self.folder / "server.key")

    @property
    def mutual(self) -> TlsFiles:
        """The same, with clients that must show a certificate of the other authority."""
        return TlsFiles(self.server.cert, self.server.key, self.folder / "other.pem")

    def client(self, authority: trustme.CA) -> dict[str, Path]:
        files = self.issue("client", authority, "client")
        return {"client_cert": files.cert, "client_key": files.key}

    def credentials(self, **fields: Any) -> Credentials:
        return Credentials(**(NOBODY | {"tls_ca": self.folder / "ours.pem"} | fields))
