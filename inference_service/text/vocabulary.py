"""The bytes that each token of a tokenizer stands for."""

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final

from tokenizers import Tokenizer

_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Pieces(dict[int, bytes]):
    """The bytes of byte-level tokens as their decoder has them, found as they are looked up."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> bytes:
        """Read a token that was not looked up before."""
        piece = str(self._tokenizer.id_to_token(token) or "")
        found = _of_alphabet(piece)
        self[token] = found = piece.encode() if found is None else found
        return found


class TokenBytes:
    """Tokens as bytes, for byte-level vocabularies, for those that fall back to bytes, and for plain ones."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        """Read a tokenizer's decoder; size is the model's vocabulary, which may be larger or smaller."""
        self.size = size
        self._tokenizer = tokenizer
        decoders = _decoders(json.loads(tokenizer.to_str())["decoder"])  # noqa: TID251 - the library wrote it
        kinds = {decoder["type"] for decoder in decoders}
        self._byte_level = "ByteLevel" in kinds
        self.pieces = Pieces(tokenizer) if kinds == {"ByteLevel"} else None
        """None where a token's text depends on its neighbours."""
        self._byte_fallback = "ByteFallback" in kinds
        self._replaced = dict(filter(None, map(_replacement, decoders)))
        added = tokenizer.get_added_tokens_decoder()
        self._literal: dict[int, str] = {token: each.content for token, each in added.items()}
        self.special: frozenset[int] = frozenset(token for token, each in added.items() if each.special)
        """Tokens that are no text: beginnings, ends, turns."""

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token, possibly a part of a character; empty where there is no such token."""
        literal = self._literal.get(token)
        if literal is not None:
            return literal.encode()
        piece: str | None = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level and (found := _of_alphabet(piece)) is not None:
            return found
        if self._byte_fallback and (byte := _BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        for mark, meaning in self._replaced.items():
            piece = piece.replace(mark, meaning)
        return piece.encode()

    def token_text(self, token: int) -> str:
        """Return a token as text; a replacement character stands for a part of a character."""
        return self.token_bytes(token).decode(errors="replace")

    @cached_property
    def all_bytes(self) -> list[bytes]:
        """The bytes of all tokens of the model."""
        return [self.token_bytes(token) for token in range(self.size)]


def _decoders(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [each for inner in decoder["decoders"] for each in _decoders(inner)]
    return [decoder]


def _replacement(decoder: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return what a decoder puts for what, for those that mark spaces."""
    if decoder["type"] == "Metaspace":
        return str(decoder["replacement"]), " "
    pattern = decoder.get("pattern")
    if decoder["type"] == "Replace" and isinstance(pattern, Mapping) and "String" in pattern:
        return str(pattern["String"]), str(decoder["content"])
    return None


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES: Final = _byte_alphabet()


def _of_alphabet(piece: str) -> bytes | None:
    """Return the bytes of a piece in GPT-2's alphabet; None for other pieces, which are text."""
    return bytes(_BYTES[char] for char in piece) if all(char in _BYTES for char in piece) else None
