"""Facts about an adapter from its config and the headers of safetensors; no tensor is read."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final

from loramux_shared.adapter_files import CONFIG, INDEX, MODEL_CONFIG, SHARD, WEIGHTS, read_small
from loramux_shared.untrusted_json import JsonInvalid, of_tensors, parse_strict_json

MAX_HEADER_BYTES: Final = 16 << 20
MAX_TENSORS: Final = 1 << 17
PICKLED: Final = ("adapter_model.bin", "adapter_model.pt")
_FACTOR: Final = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.(?P<rest>.+))?")
_LAYER: Final = re.compile(r"(?:^|\.)layers\.(?P<layer>\d{1,9})\.")
_ROOT: Final = "base_model.model."


class Unreadable(ValueError):
    """A file that is not what its name says; the message says what is wrong."""


@dataclass(frozen=True)
class Factor:
    """A or B of a module."""

    key: str
    module: str
    """As the key has it, without ``base_model.model.``."""
    side: str
    infix: str
    """Name of the adapter that raw state dicts have in their keys."""
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The rank that the shape shows; 0 where it shows none."""
        if len(self.shape) < 2:
            return 0
        embedding_a = ".lora_embedding_A" in self.key
        return self.shape[0] if embedding_a else self.shape[-2 if self.side == "A" else -1]


@dataclass(frozen=True)
class Facts:
    """An adapter as a server finds it."""

    files: frozenset[str]
    config: Mapping[str, Any] | None
    """None: there is none, or it is no JSON."""
    tensors: Mapping[str, tuple[int, ...]] | None
    """Shapes by key; None: there is no safetensors file, or its header cannot be read."""
    max_rank: int
    """Highest rank that the server is started with."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the base's ``config.json``; empty where no base is named."""

    def value(self, name: str) -> Any:
        """Return a field of the config."""
        return (self.config or {}).get(name)

    @cached_property
    def keys(self) -> frozenset[str]:
        """All keys."""
        return frozenset(self.tensors or ())

    @cached_property
    def factors(self) -> list[Factor]:
        """A and B of all modules."""
        return [factor for key, shape in (self.tensors or {}).items() if (factor := _factor(key, shape))]

    @cached_property
    def decoder(self) -> Mapping[str, Any]:
        """Fields of the base's text decoder."""
        text = self.base.get("text_config")
        return text if isinstance(text, dict) else self.base

    @property
    def is_nested(self) -> bool:
        """Return True for a base with images or sound, whose decoder is a part of it."""
        return isinstance(self.base.get("text_config"), dict)

    @cached_property
    def _rank_patterns(self) -> list[tuple[str, re.Pattern[str] | None, Any]]:
        """Entries of `rank_pattern`: each name, its pattern where it is a simple one, and its rank."""
        patterns = self.value("rank_pattern")
        return [
            (name, _compile(name), rank)
            for name, rank in (patterns.items() if isinstance(patterns, dict) else ())
        ]

    def rank_of(self, module: str) -> Any:
        """Return the rank that PEFT gives a module: that of the first pattern that matches it, else `r`.

        A pattern that is not simple counts for the module of its name alone.
        """
        for name, pattern, rank in self._rank_patterns:
            if module == name or module.endswith(f".{name}") or (pattern and pattern.match(module)):
                return rank
        return self.value("r")


# Patterns of untrusted configs that cannot backtrack for long: at most two repetitions, and no group.
_SIMPLE: Final = re.compile(r"(?=[^*+]*(?:[*+][^*+]*){0,2}$)[\w.*+^$\\-]{1,200}")


def _compile(name: str) -> re.Pattern[str] | None:
    """Return a simple pattern as PEFT reads it; None for any other."""
    try:
        return re.compile(rf"(.*\.)?({name})$") if _SIMPLE.fullmatch(name) else None
    except re.error:
        return None


def _factor(key: str, shape: tuple[int, ...]) -> Factor | None:
    if not (match := _FACTOR.fullmatch(key)):
        return None
    rest = match["rest"] or ""
    if rest == "bias" or rest.endswith(".bias"):
        return None
    infix = "" if rest == "weight" else rest.removesuffix(".weight")
    return Factor(key, match["module"].removeprefix(_ROOT), match["side"], infix, shape)


def layer_of(key: str) -> int | None:
    """Return the layer that a key names."""
    match = _LAYER.search(key)
    return int(match["layer"]) if match else None


@dataclass(frozen=True)
class Remote:
    """A repository whose files are elsewhere."""

    files: frozenset[str]
    headers: bool = False
    """True where the headers of its weights were read there."""
    shapes: Mapping[str, tuple[int, ...]] | None = None
    """Shapes that these say, as in `Facts.tensors`."""


def read_facts(folder: Path, max_rank: int, base: Path | None = None, remote: Remote | None = None) -> Facts:
    """Read a folder of this machine; remote is what is known of files that are not in it."""
    files = remote.files if remote else frozenset(path.name for path in folder.iterdir() if path.is_file())
    config = read_object(folder / CONFIG) if CONFIG in files else None
    tensors = read_shapes(folder, files) if remote is None or not remote.headers else remote.shapes
    return Facts(files, config, tensors, max_rank, (base and read_object(base / MODEL_CONFIG)) or {})


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the object of a JSON file; None where it is none."""
    try:
        value = parse_strict_json(read_small(path))
    except (OSError, JsonInvalid):
        return None
    return value if isinstance(value, dict) else None


def header_files(files: frozenset[str]) -> list[str]:
    """Return the safetensors files among those of an adapter that have its weights."""
    if WEIGHTS in files:
        return [WEIGHTS]
    return sorted(filter(SHARD.fullmatch, files)) if INDEX in files else []


def read_shapes(folder: Path, files: frozenset[str]) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of all tensors by key: of the one file, or of those that an index is beside."""
    names = header_files(files)
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for name in names:
            with (folder / name).open("rb") as file:
                header = read_header(file)
                shapes |= header_shapes(header, os.fstat(file.fileno()).st_size - 8 - len(header))
    except Unreadable:
        return None
    return shapes if names else None


def read_header(file: BinaryIO) -> bytes:
    """Return the header of a safetensors file."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise Unreadable(f"a header of {length} bytes")
    header = file.read(length)
    if len(header) < length:
        raise Unreadable(f"a header of {length} bytes, cut off after {len(header)}")
    return header


def header_shapes(header: bytes, data_bytes: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by key; raise Unreadable where the data behind the header are not theirs."""
    try:
        entries = parse_strict_json(header, of_tensors(MAX_TENSORS))
    except JsonInvalid as error:
        raise Unreadable(f"the header is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise Unreadable("the header is not an object")
    shapes: dict[str, tuple[int, ...]] = {}
    ends = [0]
    for name, entry in entries.items():
        match entry:
            case {"shape": list(shape), "data_offsets": [int(), int(end)]} if all(
                type(each) is int for each in shape
            ):
                shapes[name] = tuple(shape)
                ends.append(end)
            case _ if name != "__metadata__":
                raise Unreadable(f"{name[:100]}: expected a shape and offsets")
    if max(ends) != data_bytes:
        raise Unreadable(f"expected {max(ends)} bytes of data, found {data_bytes}")
    return shapes
