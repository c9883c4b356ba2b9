"""Tokens as bytes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from inference_service.text.vocabulary import TokenBytes


def byte_level() -> Tokenizer:
    """A tokenizer as GPT-2's: 256 bytes, one special token, one added token that is text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(["<tool é>"])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """A tokenizer as Llama 2's: pieces with a mark for spaces, and a token per byte."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "▁the": 257, "é": 258}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=20))
def test_the_bytes_of_the_tokens_are_the_text(text: str) -> None:
    """The bytes of a byte-level vocabulary's tokens are, side by side, the text's."""
    tokenizer = byte_level()
    vocabulary = TokenBytes(tokenizer, 300)
    assert b"".join(map(vocabulary.token_bytes, tokenizer.encode(text).ids)) == text.encode()


def test_added_tokens_stand_for_themselves() -> None:
    """Their text is literal, not of the byte alphabet; only special ones are no text; the rest is empty."""
    vocabulary = TokenBytes(byte_level(), 300)
    assert vocabulary.token_bytes(256) == b"<|end|>"
    assert vocabulary.token_text(257) == "<tool é>"
    assert vocabulary.special == {256}
    assert vocabulary.token_bytes(299) == b""
    assert len(vocabulary.all_bytes) == 300


def test_marks_are_spaces_and_fallback_tokens_are_bytes() -> None:
    """Half a character is half a character with byte fallback."""
    vocabulary = TokenBytes(byte_fallback(), 259)
    assert vocabulary.token_bytes(0xC3) == b"\xc3"
    assert vocabulary.token_text(0xC3) == "\N{REPLACEMENT CHARACTER}"
    assert vocabulary.token_bytes(257) == b" the"
    assert vocabulary.token_bytes(258) == "é".encode()
