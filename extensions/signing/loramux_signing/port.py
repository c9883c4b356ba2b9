"""OpenSSF model signing: the functions that `loramux_shared.signatures` asks for."""

from typing import Final

from loramux_shared.signatures import Signatures
from loramux_signing.folder import require_signed
from loramux_signing.store import signed_store

SIGNATURES: Final = Signatures(require_signed, signed_store)
