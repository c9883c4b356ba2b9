"""JSON of others is bounded before anything is made of it."""

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from builder_service.domain.safetensors_header import HeaderInvalid, TooManyTensors, read_header
from inference_service.engine.models.shard import ShardInvalid, read_shard
from loramux_shared.untrusted_json import (
    PIECE,
    Bounds,
    JsonInvalid,
    of_tensors,
    parse_json,
    parse_strict_json,
)

SMALL = Bounds(names=10, values=20)
ONE = b'"%d":{"dtype":"F32","shape":[0],"%b":[0,0]}'


@pytest.mark.parametrize("parse", [parse_json, parse_strict_json])
def test_too_much_of_json_is_refused_before_it_is_parsed(parse: Any) -> None:
    """Texts with more names, objects and lists, or more values than the bounds say are refused by name."""
    assert parse(b"[" + b"0," * 20 + b"0]", SMALL) == [0] * 21
    for text in (b"[" + b"0," * 21 + b"0]", b"[" + b"0," * 10_000):
        with pytest.raises(JsonInvalid, match="more than 20 values"):
            parse(text, SMALL)
    for text in (b"[" * 11 + b"]" * 11, b'{"a":{}' * 4, b"[[],[],[],[],[],[],[],[],[],[],[]]"):
        with pytest.raises(JsonInvalid, match="more than 10 names, objects and lists"):
            parse(text, SMALL)


@given(st.text('ab"\\[{:,\u2200', max_size=40), st.integers(0, 3))
def test_texts_count_as_one_value(text: str, shift: int) -> None:
    """Brackets and commas inside of a text do not count, nor at the ends of the pieces that are counted."""
    padded = " " * (PIECE - shift) + json.dumps([text * 30] * 9)
    assert parse_strict_json(padded.encode(), SMALL) == parse_json(padded, SMALL) == [text * 30] * 9
    with pytest.raises(JsonInvalid, match="names, objects and lists"):
        parse_json(padded + "[" * 10, SMALL)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_no_encoding_hides_brackets(encoding: str) -> None:
    """Text in other encodings is counted as it is read: bytes of its characters are no quotes."""
    text = '["\u2200\u2222\u2200",' + "[]," * 20 + "0]"
    assert parse_json(text.encode(encoding)) == json.loads(text)
    with pytest.raises(JsonInvalid, match="names, objects and lists"):
        parse_json(text.encode(encoding), SMALL)


def test_what_is_no_json_has_one_kind_of_refusal() -> None:
    """Bytes that are no text, deep nesting and broken JSON are all JsonInvalid, which is a ValueError."""
    for data in (b"\xff\xfe\xff", b"[" * 100_000, b"{", b""):
        for parse in (parse_json, parse_strict_json):
            with pytest.raises(JsonInvalid):
                parse(data)
    assert parse_json('{"time_step_limit": [0.0, Infinity]}')["time_step_limit"][1] == float("inf")
    assert issubclass(JsonInvalid, ValueError)


def test_bounds_are_those_of_the_largest_files() -> None:
    """An index and a header of as many tensors as may be are within the bounds."""
    index = {"weight_map": {f"model.layers.{n}.weight": "model-00001.safetensors" for n in range(100_000)}}
    assert parse_json(json.dumps(index).encode()) == index
    header = b"{" + b",".join(ONE % (n, b"data_offsets") for n in range(1 << 14)) + b"}"
    assert not of_tensors(1 << 14).exceeded_by(header)


def written(path: Path, header: bytes) -> Path:
    """Write a file that is a header and nothing else."""
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


def test_tensors_are_counted_however_their_keys_are_spelled(tmp_path: Path) -> None:
    """Escapes in keys hide no tensor from the count."""
    spelled = b"{" + b",".join(ONE % (n, rb"data_offset\u0073") for n in range(6)) + b"}"
    path = written(tmp_path / "x", spelled)
    assert len(read_header(path, 6).tensors) == 6
    with pytest.raises(TooManyTensors, match="6"):
        read_header(path, 5)


@pytest.mark.parametrize("part", [b'{"a":{}},', b"999,", b"[],", b'"ab",'])
def test_a_header_makes_no_more_than_its_bounds(tmp_path: Path, part: bytes) -> None:
    """A header of four megabytes of metadata is refused before it is ten times as much memory."""
    size = 4 << 20
    path = written(tmp_path / "x", b'{"__metadata__":{"a":[' + part * (size // len(part)) + b"0]}}")
    tracemalloc.start()
    with pytest.raises(HeaderInvalid, match=r"more than .* (lists|values)"):
        read_header(path, 1 << 14)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * size


def test_a_replica_bounds_headers_too(tmp_path: Path) -> None:
    """A shard of a base whose header makes too much is refused, as the builder refuses it."""
    path = written(tmp_path / "x", b'{"__metadata__":{"a":[' + b"[]," * 1_200_000 + b"0]}}")
    with pytest.raises(ShardInvalid, match="no table of tensors"):
        read_shard(path)
