"""Stop texts, incremental detokenizing, and tokens as bytes."""

import pytest
from hypothesis import example, given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from inference_service.api.requests.terms import completing
from inference_service.text.text import StopTexts, Text
from inference_service.text.vocabulary import TokenBytes
from loramux_shared.faults import RequestInvalid


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_stop_texts_cut_at_the_first_one_however_the_text_is_split(pieces, stops, keep) -> None:
    """The text ends before the earliest complete stop text, however it is split, or with a kept one."""
    finder = StopTexts(stops, keep=keep)
    printed = ""
    whole = ""
    for piece in pieces:
        printed += finder.push(piece)
        whole += piece
        hits = [whole.find(stop) for stop in stops if stop in whole]
        assert (finder.found is not None) == bool(hits)
        if hits:
            assert printed == whole[: min(hits)] + (finder.found or "") * keep
            return
        assert whole.startswith(printed)
    assert printed + finder.flush() == whole


def test_bad_words_have_two_spellings() -> None:
    """Bad words are spelt with and without a space in front, by tokens before the last; spaces are words."""
    text = _byte_text()
    a, b, c, space = (text.encode(char)[0] for char in "abc ")
    assert completing(text.bad_words(["ab", " ab", "c", " "])) == {
        0: {(): (c, space)},
        1: {(a,): (b,), (space,): (c, space)},
        2: {(space, a): (b,)},
    }


def test_nothing_is_shown_behind_a_stop_text() -> None:
    """Text that comes after a stop text is dropped, and the stop text itself too."""
    finder = StopTexts(["END"])
    assert (finder.push("one E"), finder.push("ND two"), finder.found) == ("one ", "", "END")
    assert finder.push("three") == ""


def _text_with_marks() -> Text:
    """The same with two special tokens behind the bytes."""
    tokenizer = bytes_alone()
    tokenizer.add_special_tokens(["[CALL]", "[END]"])
    return Text(tokenizer, None, 258)


def _byte_text() -> Text:
    """A tokenizer of single bytes: characters of several bytes come in pieces."""
    return Text(bytes_alone(), None, 256)


def bytes_alone() -> Tokenizer:
    """A tokenizer as GPT-2's, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_special_tokens_that_are_shown_are_in_the_text() -> None:
    """Shown special tokens are in the text; hidden ones are not, and leave the text around unchanged."""
    text = _text_with_marks()
    answer = [*text.encode("\u00e9"), 256, *text.encode("x"), 257]
    printed = {
        stated: detokenizer.push(answer)
        for stated in ((), ("[CALL]", "[NONE]", "x"))
        if (detokenizer := text.detokenizer([], visible=stated))
    }
    assert printed == {(): "\u00e9x", ("[CALL]", "[NONE]", "x"): "\u00e9[CALL]x"}
    everything = text.detokenizer([], skip_special_tokens=False, visible=("[CALL]",))
    assert everything.push(answer) == "\u00e9[CALL]x[END]"


@given(
    answer=st.lists(st.one_of(st.integers(0, 255), st.sampled_from([256, 257])), max_size=40),
    skips=st.booleans(),
    together=st.integers(1, 7),
)
@example(answer=[*"\N{REPLACEMENT CHARACTER}x".encode()], skips=True, together=1)
def test_special_tokens_and_how_many_tokens_come_together_change_nothing(answer, *, skips, together) -> None:
    """The text is the tokenizer's own, up to a character whose last bytes never came."""
    text = _text_with_marks()
    detokenizer = text.detokenizer([256, 65], skip_special_tokens=skips)
    slices = [answer[at : at + together] for at in range(0, len(answer), together)]
    emitted = "".join(map(detokenizer.push, slices))
    whole = text.decode([65, *answer], skip_special_tokens=skips).removeprefix(text.decode([65]))
    assert emitted == whole or emitted == whole.removesuffix("\N{REPLACEMENT CHARACTER}")


async def test_messages_without_a_template_are_refused() -> None:
    """A chat with a base without a template is refused."""
    with pytest.raises(RequestInvalid):
        await _byte_text().encode_messages([{"role": "user", "content": "hi"}], 256)


def byte_level() -> Tokenizer:
    """A tokenizer as GPT-2's: 256 bytes, one special token, one added token that is text."""
    tokenizer = bytes_alone()
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
    """The bytes of a text's tokens are those of the text."""
    tokenizer = byte_level()
    vocabulary = TokenBytes(tokenizer, 300)
    assert b"".join(map(vocabulary.token_bytes, tokenizer.encode(text).ids)) == text.encode()


def test_added_tokens_stand_for_themselves() -> None:
    """An added token is literal text, not the byte alphabet; special tokens have none; the rest is empty."""
    vocabulary = TokenBytes(byte_level(), 300)
    assert (vocabulary.token_bytes(256), vocabulary.token_text(257)) == (b"<|end|>", "<tool é>")
    assert (vocabulary.special, vocabulary.token_bytes(299)) == ({256}, b"")
    assert len(vocabulary.all_bytes) == 300


def test_marks_are_spaces_and_fallback_tokens_are_bytes() -> None:
    """Half a character is half a character with byte fallback."""
    vocabulary = TokenBytes(byte_fallback(), 259)
    assert (vocabulary.token_bytes(0xC3), vocabulary.token_text(0xC3)) == (b"\xc3", "\N{REPLACEMENT CHARACTER}")
    assert (vocabulary.token_bytes(257), vocabulary.token_bytes(258)) == (b" the", "é".encode())
