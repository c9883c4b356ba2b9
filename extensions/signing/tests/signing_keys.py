"""Keys and certificates that sign."""

from pathlib import Path

import pytest
import trustme

from loramux_shared.signatures import SigningKey, read_signer

pytest.importorskip("model_signing", reason="pip install 'loramux[signing]'", exc_type=ImportError)

from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec


def new_key(folder: Path, name: str = "key") -> tuple[SigningKey, str]:
    """Return a P-256 key and its signer, with the public half in a file beside the key."""
    private = ec.generate_private_key(ec.SECP256R1())
    pem, path = form.Encoding.PEM, folder / f"{name}.pem"
    path.write_bytes(private.private_bytes(pem, form.PrivateFormat.PKCS8, form.NoEncryption()))
    public = private.public_key().public_bytes(pem, form.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return SigningKey(path), read_signer(f"{name}.pub", folder)


def new_certificate(folder: Path, name: str = "key") -> tuple[SigningKey, str]:
    """Return a key with a certificate of a new authority, whose certificate is in a file too."""
    authority = trustme.CA()
    issued = authority.issue_cert("signer@example.com")
    issued.private_key_pem.write_to_path(folder / f"{name}.pem")
    for blob in issued.cert_chain_pems:
        blob.write_to_path(folder / f"{name}.chain", append=True)
    authority.cert_pem.write_to_path(folder / f"{name}.ca")
    return SigningKey(folder / f"{name}.pem", folder / f"{name}.chain"), read_signer(f"{name}.ca", folder)
