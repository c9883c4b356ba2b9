"""Bounds of a request's size before anything is made of it."""

import json
from typing import Any, cast

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from inference_service.api.requests.bounds import JSON, MAX_NAMES
from inference_service.text.text import SLICE_CHARS, Text
from loramux.inference.v1 import inference_pb2 as pb
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.faults import DeploymentInvalid, PromptTooLong, RequestInvalid
from loramux_shared.rpc.wire import MAX_FIELDS, bounded, more_fields
from loramux_shared.wording import MAX_FINDINGS, nearest

VALUES: Any = st.recursive(
    st.none() | st.integers() | st.text('ab"\\{}[]:,', max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('a":,\\'), inner, max_size=3),
    max_leaves=30,
)
PIECES = st.sampled_from(["ab ", "abab", "a", " ", "\n\n\n\n", "b" * 40, "é", "\N{GRINNING FACE}"])


@given(VALUES)
def test_json_unfolds_to_nothing_else(value: Any) -> None:
    """Brackets, colons and commas inside of texts do not count, however they are escaped."""
    stated = json.dumps(json.dumps(value) * 3)
    assert JSON.exceeded_by(f"[{stated}]".encode()) == ""


@pytest.mark.parametrize("element", ["[],", "{},", '"a":[],', '{"a":1},', "[[]],"])
def test_json_of_too_many_names_and_lists_is_reported(element: str) -> None:
    """A body above the limit of names and lists is refused, whatever texts stand between; one at it is not."""
    per = sum(map(element.count, "[{:"))
    fits = element * (MAX_NAMES // per)
    quiet = '"[{:\\"[[",'
    assert JSON.exceeded_by((quiet * 9 + fits).encode()) == ""
    assert "names" in JSON.exceeded_by((quiet * 9 + fits + element).encode())


def byte_pairs() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["abab " * 9, "b" * 64, "\n" * 32] * 50, trainer)
    return tokenizer


TEXT = Text(byte_pairs(), None, 400)


@settings(max_examples=6)
@given(st.lists(PIECES, min_size=1, max_size=20), st.integers(1, 4))
def test_a_text_that_fits_is_never_too_long(pieces: list[str], times: int) -> None:
    """A text with no more tokens than allowed is taken, whatever it is cut into."""
    unit = "".join(pieces)
    text = unit * (times * SLICE_CHARS // len(unit) + 1)
    tokens = TEXT.encode(text)
    assert TEXT.encode_prompt(text, len(tokens)) == tokens


def test_a_text_that_cannot_fit_is_refused_after_its_first_slices() -> None:
    """The message gives the count and the limit; the rest of the text is not read."""
    looked_at = 0

    class Counting:
        """A tokenizer, and how many characters it was given."""

        def __getattr__(self, name: str) -> Any:
            def encode(texts: Any, **options: Any) -> Any:
                nonlocal looked_at
                looked_at += sum(map(len, texts))
                return getattr(tokenizer, name)(texts, **options)

            return encode if name.startswith("encode") else getattr(tokenizer, name)

    tokenizer: Any = byte_pairs()
    text = Text(cast(Tokenizer, Counting()), None, 400)
    with pytest.raises(PromptTooLong, match=r"has at least \d{4,} tokens, and at most 100 are taken"):
        text.encode_prompt("a b " * 2_000_000, 100)
    assert 0 < looked_at <= 2 * SLICE_CHARS


def test_half_a_character_is_no_prompt() -> None:
    """A lone surrogate is named, not a failure."""
    with pytest.raises(RequestInvalid, match="lone surrogate"):
        TEXT.encode_prompt("\ud800", 9)


@pytest.mark.parametrize(
    "data", [b"\x0a", b"\xff" * 50, b"\x22\xff\xff\x03\x0a", b"\x0b" * 9, b"\x22\x04\x0a\x02\x0a\xff"]
)
def test_broken_messages_are_counted_too(data: bytes) -> None:
    """A message that cannot be parsed is counted without an error."""
    assert not more_fields(data, pb.GenerateRequest.DESCRIPTOR, MAX_FIELDS)


def test_fields_of_messages_inside_count() -> None:
    """A request of as many fields as may be is parsed; one more is refused."""
    turns = [pb.Message(role="user", content="x")] * ((MAX_FIELDS - 1) // 3)
    fits = pb.GenerateRequest(messages=pb.Messages(messages=turns))
    parse = bounded(pb.GenerateRequest.FromString)
    assert parse(fits.SerializeToString()) == fits
    fits.messages.messages.add(role="user", content="x")
    with pytest.raises(RequestInvalid, match="fields"):
        parse(fits.SerializeToString())


def test_near_names_are_looked_for_a_few_times() -> None:
    """A file of many unknown keys is refused with the first of them, and with how many rules it breaks."""
    keys = {f"max_seq_le{number}": 1 for number in range(5000)} | {"m" * 100_000: 1}
    with pytest.raises(DeploymentInvalid, match=r"breaks 500[0-9] rules") as caught:
        parse_deployment({"model_name": "x", "build": keys})
    assert len(caught.value.findings) == MAX_FINDINGS
    assert (nearest("max_seq_le1", ["max_seq_len"]), nearest("m" * 100_000, ["m" * 64])) == ("max_seq_len", "")
