"""Tokens that an adapter's tokenizer has behind the base's last one, as a file of its bundle.

The flags are those of the tokenizers library's ``AddedToken``.
"""

from typing import Literal

from pydantic import Field

from loramux_shared.bundle.manifest import FORMAT_VERSION, Record
from loramux_shared.deployment import Model


class AddedToken(Model):
    """One of them."""

    id: int = Field(ge=0, lt=1 << 31)
    content: str = Field(min_length=1)
    special: bool
    """No text: a beginning, an end, a turn."""
    lstrip: bool
    """It takes the spaces before it."""
    rstrip: bool
    """It takes the spaces behind it."""
    single_word: bool
    """It is none within a word."""
    normalized: bool
    """It is looked for in the normalized text."""


class OwnTokens(Record):
    """A use of the tokens that an adapter has and its base lacks."""

    format_version: Literal[1] = FORMAT_VERSION
    vocab: int = Field(ge=1)
    """Rows of its embeddings and columns of its logits; more or fewer than the base's, or as many."""
    tokens: tuple[AddedToken, ...] = ()
    """Added tokens by id, consecutive."""
