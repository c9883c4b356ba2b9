"""The header of a GGUF file: metadata, and where its tensors lie."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from loramux_shared.bases.files import GGUF_SUFFIX
from loramux_shared.faults import CheckpointInvalid
from loramux_shared.sources.files import is_text
from loramux_shared.wording import listed

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
ALIGNMENT: Final = 32
MAX_HEADER: Final = 64 << 20
"""Bytes of a header; that of Gemma 3, with 262,144 tokens, has 1.5e7."""
MAX_ENTRIES: Final = 1 << 16
"""Tensors, and entries of metadata: more than any model has."""
MAX_VALUES: Final = 1 << 21
"""Values of all arrays together; the largest vocabularies have 1.3e6 tokens, scores, types and merges."""
MAX_TEXT: Final = 1 << 20
"""Bytes of a text: of a chat template."""
MAX_ITEM: Final = 1 << 10
"""Bytes of a text in an array: a token is cut at each of its characters."""
MAX_FREQUENCIES: Final = 1 << 12
MAX_PARTS: Final = 1 << 10
"""Files of a model."""
_PART: Final = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")
MOST_DIMENSIONS: Final = 4
NUMBERS: Final = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""Types of numbers in metadata, as `struct` writes them."""
TEXT: Final = 8
ARRAY: Final = 9
FREQUENCIES: Final = "rope_freqs.weight"
"""Factors of the frequencies of Llama 3.1 and later."""
TYPES: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
SIZES: Final = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144),
    "Q5_K": (256, 176), "Q6_K": (256, 210), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
}  # fmt: skip
"""Types that are served: values of a block, and its bytes."""
IN_MEMORY: Final = {"Q2_K": 2 * 256, "Q3_K": 210, "IQ4_NL": 34, "IQ4_XS": 256 + 8 + 2}
"""Bytes of a block where products take it in another form: in bfloat16, in 6 bits, in 8 bits."""
WHOLE: Final = ("F32", "F16", "BF16")
"""Those of numbers that are kept one by one."""


@dataclass(frozen=True)
class TensorPlace:
    """A tensor of a file."""

    type: str
    shape: tuple[int, ...]
    """Rows first."""
    offset: int
    """Place in the file."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        values, size = SIZES[self.type]
        return math.prod(self.shape) // values * size


@dataclass(frozen=True)
class GgufHeader:
    """The part of a file before its tensors."""

    name: str
    fields: dict[str, Any]
    tensors: dict[str, TensorPlace]
    """Tensors by GGUF's names, in the order in which they lie."""
    factors: list[float]
    """Those of `FREQUENCIES`."""

    def invalid(self, what: str) -> CheckpointInvalid:
        """Return what is raised about the file."""
        return CheckpointInvalid(f"{self.name}: {what}")

    def text(self, key: str, default: str = "") -> str:
        """Return a string of the metadata."""
        text = str(self._typed(key, str, default, "a text"))
        if not is_text(text):
            raise self.invalid(f"{key}: expected UTF-8, found other bytes. Convert the model again.")
        return text

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a whole number of the metadata; without a default it must be there."""
        return int(self._typed(key, int, default, "a whole number"))

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number; float32 are given the shortest decimals that mean them."""
        value = self.fields.get(key, default)
        if isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, float) or not math.isfinite(value):
            raise self.invalid(f"{key}: expected a number, found {value!r:.80}.")
        return float(f"{value:.7g}")

    def array(self, key: str, of: type) -> list[Any]:
        """Return an array of the metadata; an empty one where there is none."""
        values = self.fields.get(key, [])
        if not isinstance(values, list) or not all(isinstance(each, of) for each in values):
            raise self.invalid(f"{key}: expected an array of {of.__name__}.")
        if of is str and not is_text("".join(values)):
            raise self.invalid(f"{key}: expected UTF-8, found other bytes. Convert the model again.")
        return values

    def _typed(self, key: str, kind: type, default: Any, expected: str) -> Any:
        value = self.fields.get(key, default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.invalid(f"{key}: expected {expected}, found {value!r:.80}.")
        return value


def parts_of(path: Path) -> list[Path]:
    """Return all files of a model one of whose files has this path: they differ in their number."""
    name = _PART.fullmatch(path.name)
    if name is None or not 0 < int(name["number"]) <= int(name["count"]) <= MAX_PARTS:
        return [path]
    numbers = range(1, int(name["count"]) + 1)
    return [
        path.with_name(f"{name['stem']}-{number:05d}-of-{name['count']}{GGUF_SUFFIX}") for number in numbers
    ]


def files_of(path: Path) -> list[Path]:
    """Return all files of a model as `parts_of` does; raise CheckpointInvalid where one is not there."""
    parts = parts_of(path)
    if lost := next((part.name for part in parts if not part.is_file()), ""):
        raise CheckpointInvalid(f"{path.name}: expected {lost} beside it, found no such file.")
    return parts


def read_model(path: Path) -> GgufHeader:
    """Read the headers of all files of a model as one, whose tensors have places of no single file.

    Raises:
        CheckpointInvalid: see `read_header`; or files are missing, or are of several models.
        OSError: one cannot be read.
    """
    return join_headers([read_header(part) for part in files_of(path)])


def join_headers(headers: Sequence[GgufHeader]) -> GgufHeader:
    """Return the headers of all files of a model as one, see `read_model`."""
    whole, *others = headers
    for header in others:
        if twice := header.tensors.keys() & whole.tensors.keys():
            raise header.invalid(f"{min(twice)} is in another file too.")
        whole.tensors.update(header.tensors)
        whole.factors.extend(header.factors)
    count = whole.integer("split.tensors.count", len(whole.tensors)) if others else len(whole.tensors)
    if count != len(whole.tensors):
        raise whole.invalid(f"expected {count} tensors in all files, found {len(whole.tensors)}.")
    return whole


def read_header(path: Path) -> GgufHeader:
    """Read the header of a file; one of several has the metadata of the first.

    Raises:
        CheckpointInvalid: the file is no GGUF file, is cut off, is one of several and not named as such, or has
            tensors of another type than is served.
        OSError: it, or the first, cannot be read.
    """
    with path.open("rb") as file:
        header = parse_header(path, file, path.stat().st_size)
    if (first := parts_of(path)[0]) != path:
        header.fields.update(read_header(first).fields)
    return header


def parse_header(path: Path, file: IO[bytes], size: int) -> GgufHeader:
    """Read the header of an open file of this name and size, see `read_header`, with its own metadata alone."""
    reader = _HeaderReader(path.name, file, size)
    if reader.take(4) != MAGIC:
        raise reader.invalid("expected a GGUF file, found other bytes.")
    version, *counts = reader.numbers("IQQ")
    if version not in VERSIONS:
        raise reader.invalid(
            f"version {version} of GGUF is not read; read: {listed([str(each) for each in VERSIONS])}, "
            "little-endian. Convert the model again."
        )
    if max(counts) > MAX_ENTRIES:
        raise reader.invalid(f"{max(counts)} entries in its header: it is damaged.")
    tensors, entries = counts
    fields = reader.entries(entries)
    places = [reader.tensor() for _ in range(tensors)]
    header = GgufHeader(path.name, fields, {}, [])
    _check_name(path, header)
    _check_types(header, places)
    _place(header, places, reader)
    if FREQUENCIES in header.tensors:
        header.factors.extend(reader.floats(header.tensors[FREQUENCIES]))
    return header


def _check_name(path: Path, header: GgufHeader) -> None:
    """Require that a file of several has the number that its name says; one that was merged says 0 of 0."""
    parts, number = parts_of(path), header.fields.get("split.no", 0)
    count = header.fields.get("split.count") or 1
    if (count, number) != (len(parts), parts.index(path)):
        raise header.invalid(
            f"it says that it is number {number!r:.20} of {count!r:.20} files, counted from 0: expected a name "
            "like NAME-00001-of-00003.gguf that says the same."
        )


def _check_types(header: GgufHeader, places: list[tuple[str, TensorPlace]]) -> None:
    refused = {place.type: name for name, place in reversed(places) if place.type not in SIZES}
    if refused:
        name = next(iter(refused.values()))
        raise header.invalid(
            f"tensors of {listed(sorted(refused))} are not supported ({name}); supported: {', '.join(SIZES)}. "
            "Quantise the model to Q4_K_M or Q8_0."
        )
    for name, place in places:
        if 0 in (place.shape or [0]) or place.shape[-1] % SIZES[place.type][0]:
            raise header.invalid(f"{name}: shape {place.shape} has no whole blocks of {place.type}.")


def _place(header: GgufHeader, places: list[tuple[str, TensorPlace]], reader: _HeaderReader) -> None:
    """Enter the tensors with their places in the file."""
    alignment = header.fields.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise header.invalid(f"general.alignment: expected a positive number, found {alignment!r:.80}.")
    first, end = -(-reader.at // alignment) * alignment, 0
    for name, place in sorted(places, key=lambda each: each[1].offset):
        if name in header.tensors:
            raise header.invalid(f"{name} is there twice.")
        if place.offset < end:
            raise header.invalid(f"{name} begins within the tensor before it.")
        end = place.offset + place.num_bytes
        header.tensors[name] = TensorPlace(place.type, place.shape, first + place.offset)
    if first + end > reader.size:
        raise header.invalid(
            f"its tensors end at byte {first + end}, and the file at {reader.size}. Is the download complete?"
        )


class _HeaderReader:
    """Reads values one after the other."""

    def __init__(self, name: str, file: IO[bytes], size: int) -> None:
        self._name, self._file = name, file
        self.size, self.at, self._values_left = size, 0, MAX_VALUES

    def invalid(self, what: str) -> CheckpointInvalid:
        return CheckpointInvalid(f"{self._name}: {what}")

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        if self.at + count > MAX_HEADER:
            raise self.invalid(f"its header has more than {MAX_HEADER} bytes: it is damaged.")
        data = self._file.read(count) if count <= self.size - self.at else b""
        if len(data) != count:
            raise self.invalid(f"it ends within its header, at byte {self.size}. Is the download complete?")
        self.at += count
        return data

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        """Return the next numbers."""
        return struct.unpack(f"<{kinds}", self.take(struct.calcsize(f"<{kinds}")))

    def text(self, most: int = MAX_TEXT) -> str:
        """Return the next text; bytes that are none stay what they are."""
        [length] = self.numbers("Q")
        if most < length <= self.size - self.at:
            raise self.invalid(f"a text of {length} bytes in its header, expected at most {most}.")
        return self.take(length).decode(errors="surrogateescape")

    def name(self) -> str:
        """Return the next name of a tensor, or key of the metadata."""
        name = self.text(MAX_ITEM)
        if not is_text(name):
            raise self.invalid(f"the name {name!r} is not UTF-8. Convert the model again.")
        return name

    def entries(self, count: int) -> dict[str, Any]:
        """Return the metadata, whose entries are so many."""
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.name()
            if key in found:
                raise self.invalid(f"{key} is there twice.")
            [kind] = self.numbers("I")
            found[key] = self._values(key, kind, 1)[0] if kind != ARRAY else self._array(key)
        return found

    def _array(self, key: str) -> list[Any]:
        kind, count = self.numbers("IQ")
        if count > self._values_left:
            raise self.invalid(f"{key} has {count} values: its header is damaged.")
        self._values_left -= count
        return self._values(key, kind, count, MAX_ITEM)

    def _values(self, key: str, kind: int, count: int, longest: int = MAX_TEXT) -> list[Any]:
        if kind == TEXT:
            return [self.text(longest) for _ in range(count)]
        if kind not in NUMBERS:
            raise self.invalid(f"{key} is of type {kind}, which no metadata has: its header is damaged.")
        return list(self.numbers(f"{count}{NUMBERS[kind]}"))

    def tensor(self) -> tuple[str, TensorPlace]:
        """Return the name of the next tensor, and its offset among the tensors."""
        name = self.name()
        [dimensions] = self.numbers("I")
        if dimensions > MOST_DIMENSIONS:
            raise self.invalid(f"{name} has {dimensions} dimensions: its header is damaged.")
        shape = self.numbers(f"{dimensions}Q")
        kind, offset = self.numbers("IQ")
        return name, TensorPlace(TYPES.get(kind, f"type {kind}"), shape[::-1], offset)

    def floats(self, place: TensorPlace) -> tuple[float, ...]:
        """Return the values of a small tensor in float32."""
        if place.type != "F32":
            raise self.invalid(f"{FREQUENCIES}: expected F32, found {place.type}.")
        if place.num_bytes > 4 * MAX_FREQUENCIES:
            raise self.invalid(f"{FREQUENCIES}: expected at most {MAX_FREQUENCIES} factors.")
        self._file.seek(place.offset)
        return struct.unpack(f"<{place.num_bytes // 4}f", self._file.read(place.num_bytes))
