"""Safetensors files that lie about themselves."""

import json
import struct
from pathlib import Path

import numpy as np

from tests.golden.hostile.exhibit import WEIGHTS, Exhibit, adapter, entry, exhibit, header, of_bytes
from tests.support.adapters import key, tensors
from tests.support.cases import cases

_PAIR = 2 * 4 * 16
"""Bytes of A, and of B, of q_proj in float16 with rank 4."""


def _bad(name: str, entries: object, size: int = 0) -> Exhibit:
    return of_bytes(name, "E_BAD_WEIGHTS", lambda: header(entries, bytes(size)))


def _backwards() -> bytes:
    """A file whose tensors lie in another order than its header names them."""
    names = list(tensors())
    random = np.random.default_rng(0)
    data, entries, offset = [], {}, 0
    for name in reversed(names):
        values = tensors()[name].astype(np.float16)
        entries[name] = entry(*values.shape, begin=offset)
        data.append(values.tobytes())
        offset += values.nbytes
    random.shuffle(names)
    return header({name: entries[name] for name in names}, b"".join(data))


def many_tensors() -> bytes:
    """A file of 20,000 tensors of rank 4: q_proj in 10,000 layers."""
    entries, offset = {"__metadata__": {"format": "pt"}}, 0
    for layer in range(10_000):
        for side, shape in (("A", (4, 16)), ("B", (16, 4))):
            entries[key(layer, "q_proj", side)] = entry(*shape, begin=offset)
            offset += _PAIR
    return header(entries, bytes(offset))


def _write_many(folder: Path) -> None:
    adapter(folder, {}, target_modules=["q_proj"])
    (folder / WEIGHTS).write_bytes(many_tensors())


_A = key(0, "q_proj", "A")
_NAMES = {"A": _A, "B": key(0, "q_proj", "B")}
_TENSOR = json.dumps(entry(4, 16, begin=0))

REFUSED = (
    *(_bad(name, {_NAMES.get(key, key): value for key, value in entries.items()}, size)
      for name, entries, size in cases(__file__, "REFUSED")),
    of_bytes("empty", "E_BAD_WEIGHTS", bytes),
    of_bytes("a web page", "E_BAD_WEIGHTS", lambda: b"<!DOCTYPE html><html><head><title>404</title>" * 9),
    of_bytes("header longer than the file", "E_BAD_WEIGHTS", lambda: struct.pack("<Q", 100) + b"{}"),
    of_bytes("header of 17 MiB", "E_BAD_WEIGHTS", lambda: header(b"{" + b" " * (17 << 20) + b"}")),
    _bad("header that is a list", b"[]"),
    _bad("header that is no text", b"\xff\xfe"),
    _bad("header of deep brackets", b"[" * 100_000),
    _bad("header with NaN", b'{"a": NaN}'),
    _bad("blanks before the header", b" " + json.dumps({_A: entry(4, 16, begin=0)}).encode(), _PAIR),
    _bad("minus zero", json.dumps({_A: entry(4, 16, begin=0)}).replace("[0,", "[-0,").encode(), _PAIR),
    _bad("a key with half a character", f'{{"{_A}\\ud800": {_TENSOR}}}'.encode(), _PAIR),
    _bad("a key twice", f'{{"{_A}": {_TENSOR}, "{_A}": {_TENSOR}}}'.encode(), _PAIR),
    _bad("shape of huge numbers", {_A: entry(*[10**4000] * 8, begin=0, size=_PAIR)}, _PAIR),
    exhibit("20,000 tensors", "E_TENSORS", _write_many),
)  # fmt: skip

ACCEPTED = (of_bytes("tensors in another order", "", _backwards),)
