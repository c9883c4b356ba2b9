"""Shapes of adapters, and the tools to write them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import save_file

from tests.support.adapters import Tensors, tensors
from tests.support.cases import cases

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
NAME: Final = "base"
"""The folder of the base, and the name of it that configs give."""
ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL: Final = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

# Which fields a release of PEFT began to write, with their defaults; of 0.2 two that were dropped again.
RELEASES: Final[dict[str, dict[str, Any]]] = cases(__file__, "RELEASES")
NEWEST: Final = list(RELEASES)[-1]


def of_peft(release: str = NEWEST, **changes: Any) -> dict[str, Any]:
    """Return the config that a release of PEFT writes, with some fields changed."""
    config: dict[str, Any] = {}
    for name, fields in RELEASES.items():
        config |= fields
        if name == release:
            break
    if release != "0.2":
        del config["enable_lora"], config["merge_weights"]
    return config | changes


@dataclass(frozen=True)
class Shape:
    """A folder as some program writes it, and what becomes of it."""

    writer: str
    release: str
    what: str
    """Description of the shape."""
    config: Mapping[str, Any] | None = field(default_factory=of_peft)
    """None: there is no config."""
    tensors: Callable[[], Tensors] | None = tensors
    """None: there is no file of tensors."""
    codes: str = ""
    """Codes that it gets, separated by blanks; with one that refuses it nothing is published."""
    base: str = "llama"
    under: Mapping[str, str] | None = None
    """Replacements in the keys before PEFT loads them; None: it loads the very files."""
    files: tuple[str, ...] = ()
    """Other files, of one byte."""
    shards: int = 0
    """Files that the tensors are in, beside an index; 0: one file alone."""
    max_rank: int = 64

    @property
    def refused(self) -> bool:
        """Return True if a code refuses it."""
        return any(code.startswith("E_") for code in self.codes.split())

    @property
    def name(self) -> str:
        """The unique name of a shape."""
        return f"{self.writer} {self.release} {self.what}"

    def write(self, folder: Path) -> Path:
        """Write the folder as the program does."""
        folder.mkdir(parents=True)
        for name in self.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")
        if self.config is not None:
            (folder / CONFIG).write_text(json.dumps(self.config, indent=2))
        if self.tensors is not None:
            _save(folder, self.tensors(), self.shards)
        return folder

    def write_for_peft(self, folder: Path) -> Path:
        """Write the shape so that PEFT loads it: one file, keys as PEFT writes them."""
        folder.mkdir(parents=True)
        (folder / CONFIG).write_text(json.dumps(self.config))
        renamed: Tensors = {}
        for key, value in (self.tensors or dict)().items():
            for old, new in (self.under or {}).items():
                key = key.replace(old, new)
            renamed[key] = value
        save_file(renamed, folder / WEIGHTS)
        return folder


def _save(folder: Path, values: Tensors, shards: int) -> None:
    if not shards:
        save_file(values, folder / WEIGHTS)
        return
    files = [f"adapter_model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    places = {key: files[at * shards // len(values)] for at, key in enumerate(values)}
    for file in files:
        save_file({key: value for key, value in values.items() if places[key] == file}, folder / file)
    index = {"metadata": {"total_size": sum(value.nbytes for value in values.values())}, "weight_map": places}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2))


def renamed(*pairs: tuple[str, str], of: Callable[[], Tensors] = tensors) -> Callable[[], Tensors]:
    """Return tensors with something put for something else in their keys."""

    def make() -> Tensors:
        made = of()
        for old, new in pairs:
            made = {key.replace(old, new): value for key, value in made.items()}
        return made

    return make


def beside(*extra: tuple[str, tuple[int, ...]], of: Callable[[], Tensors] = tensors) -> Callable[[], Tensors]:
    """Return tensors with some more, of these keys and shapes."""
    return lambda: of() | {key: drawn(shape, at) for at, (key, shape) in enumerate(extra)}


def only(*keys: tuple[str, tuple[int, ...]]) -> Callable[[], Tensors]:
    """Return tensors of these keys and shapes alone."""
    return beside(*keys, of=dict)


def drawn(shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    """Return random values."""
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)
