"""OpenSSF model signing: the functions that `loramux_shared.signatures` asks for."""

from loramux_signing.folder import require_signed as require_signed
from loramux_signing.store import signed_store as signed_store
