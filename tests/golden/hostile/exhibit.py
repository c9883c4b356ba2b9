"""Exhibits of the golden museum, and the tools to make them."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.support.adapters import HIDDEN, VOCAB, Tensors, tensors, write_adapter, write_base

ROOT = "base_model.model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base"
"""The folder of the museum's base, and the name of it that exhibits give, so that none is warned about it."""


@dataclass(frozen=True)
class Exhibit:
    """An adapter, and the codes that it gets: these and no others."""

    name: str
    codes: frozenset[str]
    make: Callable[[Path], object]
    """Writes the adapter's folder."""
    base: dict[str, Any] = field(default_factory=dict)
    """Changes to the base's ``config.json``."""
    lora: dict[str, Any] = field(default_factory=dict)
    """``lora_configuration`` of the deployment."""
    signed_by: tuple[str, ...] = ()
    """Required signers."""

    @property
    def refused(self) -> bool:
        return any(code.startswith("E_") for code in self.codes)


def exhibit(name: str, codes: str, make: Callable[[Path], object], **settings: Any) -> Exhibit:
    """Make an exhibit; codes are separated by blanks."""
    return Exhibit(name, frozenset(codes.split()), make, **settings)


def of_config(name: str, codes: str, **config: Any) -> Exhibit:
    """An exhibit of good tensors whose config has these fields too."""
    return exhibit(name, codes, lambda folder: adapter(folder, **config))


def of_tensors(name: str, codes: str, values: Callable[[], Tensors], **settings: Any) -> Exhibit:
    return exhibit(name, codes, lambda folder: adapter(folder, values()), **settings)


def of_config_text(name: str, codes: str, text: Callable[[], str]) -> Exhibit:
    return exhibit(name, codes, lambda folder: (adapter(folder) / CONFIG).write_text(text()))


def of_bytes(name: str, codes: str, data: Callable[[], bytes]) -> Exhibit:
    """An exhibit of a good config whose weights are these bytes."""
    return exhibit(name, codes, lambda folder: (adapter(folder) / WEIGHTS).write_bytes(data()))


def of_files(name: str, codes: str, *files: str) -> Exhibit:
    """An exhibit of files with these names: config and weights are good ones, the others are of one byte."""

    def make(folder: Path) -> None:
        adapter(folder)
        for path in (CONFIG, WEIGHTS):
            if path not in files:
                (folder / path).unlink()
        for file in set(files) - {CONFIG, WEIGHTS}:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(b"x")

    return exhibit(name, codes, make)


def adapter(folder: Path, values: Tensors | None = None, **config: Any) -> Path:
    """Write an adapter of the museum's base."""
    return write_adapter(folder, values, **{"base_model_name_or_path": BASE} | config)


def base(folder: Path, config: dict[str, Any]) -> None:
    """Write the museum's base: the one of all tests, with embeddings that are not zero."""
    write_base(folder, **config)
    save_file({"model.embed_tokens.weight": embeddings()}, folder / "model.safetensors")


def embeddings() -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).normal(size=(VOCAB, HIDDEN)).astype(ml_dtypes.bfloat16)


def plus(name: str, shape: tuple[int, ...] = (4, 16), **other: Any) -> Tensors:
    """Good tensors and another one of ones, or a pair of them with ``pair=(shape of B)``."""
    made = {**tensors(), name: np.ones(shape, np.float16)}
    if "pair" in other:
        made[name.replace("lora_A", "lora_B")] = np.ones(other["pair"], np.float16)
    return made


def header(entries: Any, data: bytes = b"") -> bytes:
    """A safetensors file with this header, as an object or as text."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(*shape: int, begin: int, dtype: str = "F16", size: int | None = None) -> dict[str, Any]:
    """A tensor of a header; the size is that of two bytes per element unless it is given."""
    length = 2 * int(np.prod(shape, dtype=object)) if size is None else size
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + length]}
