"""The tokens of a text beside the characters that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import Encoding, Tokenizer


@dataclass(frozen=True)
class Wording:
    """The way from the tokens of a tokenizer back to words, as transformers' pipelines go it."""

    join: Callable[[Sequence[str]], str]
    """Returns the text of tokens."""
    marks_parts: bool
    """True if tokens within a word have a prefix, such as ``##``."""
    unknown: int | None
    """The token of characters that have none."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, unknown: str | None) -> Wording:
        """Return that of a tokenizer, with the unknown token that its config names; None: it names none."""
        name = unknown or getattr(tokenizer.model, "unk_token", None) or "<unk>"
        decoder = tokenizer.decoder
        return cls(
            " ".join if decoder is None else decoder.decode,
            bool(getattr(tokenizer.model, "continuing_subword_prefix", None)),
            tokenizer.token_to_id(name),
        )


@dataclass(frozen=True)
class Spans:
    """A text as tokens, each with its first character and the one behind its last."""

    text: str
    encoding: Encoding
    wording: Wording

    @property
    def ids(self) -> list[int]:
        """Return the tokens."""
        ids: list[int] = self.encoding.ids
        return ids

    @property
    def places(self) -> list[int]:
        """Return the places of the tokens that stand for characters, not those that the tokenizer added."""
        return [place for place, special in enumerate(self.encoding.special_tokens_mask) if not special]

    def bounds(self, place: int) -> tuple[int, int]:
        """Return the first character of a token, and the one behind its last."""
        start, end = self.encoding.offsets[place]
        return start, end

    def word(self, place: int) -> str:
        """Return the name of a token, or its characters where it is the unknown one."""
        if self.encoding.ids[place] == self.wording.unknown:
            return self.text[slice(*self.bounds(place))]
        return str(self.encoding.tokens[place])

    def is_part(self, place: int) -> bool:
        """Return True if a token goes on with the word of the token before."""
        if self.encoding.ids[place] == self.wording.unknown:
            return False
        start, end = self.bounds(place)
        if self.wording.marks_parts:
            return len(self.word(place)) != end - start
        return start > 0 and " " not in self.text[start - 1 : start + 1]
