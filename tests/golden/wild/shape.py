"""Shapes of adapters, and the tools to write them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from safetensors.numpy import save_file

from tests.support.adapters import LAYERS, Tensors, key, tensors
from tests.support.cases import cases

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
NAME: Final = "base"
"""The folder of the base, and the name of it that configs give."""
# Which fields a release of PEFT began to write, with their defaults; of 0.2 two that were dropped again.
RELEASES: Final[dict[str, dict[str, Any]]] = cases(__file__, "RELEASES")
NEWEST: Final = list(RELEASES)[-1]
# Fields of other kinds than LoRA, and of programs that write as few as PEFT needs.
CONFIGS: Final[dict[str, dict[str, Any]]] = cases(__file__, "CONFIGS")


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


def config_of(of: str | None = None, without: Sequence[str] = (), **changes: Any) -> dict[str, Any]:
    """Return the fields of a release of PEFT, or of a name in the table, with changes."""
    known = config_of(**CONFIGS[of]) if of in CONFIGS else of_peft(of) if of else {}
    return {name: value for name, value in (known | changes).items() if name not in without}


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
        return any(code.startswith("E_") for code in self.codes.split())

    @property
    def name(self) -> str:
        return f"{self.writer} {self.release} {self.what}"

    def write(self, folder: Path) -> Path:
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
        for name, value in (self.tensors or dict)().items():
            for old, new in (self.under or {}).items():
                name = name.replace(old, new)
            renamed[name] = value
        save_file(renamed, folder / WEIGHTS)
        return folder


def _save(folder: Path, values: Tensors, shards: int) -> None:
    if not shards:
        save_file(values, folder / WEIGHTS)
        return
    files = [f"adapter_model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    places = {name: files[at * shards // len(values)] for at, name in enumerate(values)}
    for file in files:
        save_file({name: value for name, value in values.items() if places[name] == file}, folder / file)
    index = {"metadata": {"total_size": sum(value.nbytes for value in values.values())}, "weight_map": places}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2))


def made(
    modules: tuple[str, ...] = ("q_proj", "v_proj"),
    rank: int = 4,
    layers: int = LAYERS,
    renamed: Mapping[str, str] = MappingProxyType({}),
    parts: Mapping[str, Mapping[str, tuple[int, ...]]] = MappingProxyType({}),
    beside: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    value: float | None = None,
) -> Tensors:
    """Return A and B of modules, then tensors of these shapes: parts of a module in each layer, and others."""
    values = tensors(tuple(modules), rank, layers)
    shapes = {
        f"{key(layer, module, '').partition('.lora_')[0]}.{part}": shape
        for layer in range(layers) for module in parts for part, shape in parts[module].items()
    }  # fmt: skip
    values |= {name: _drawn(shape, at, value) for at, (name, shape) in enumerate(shapes.items())}
    for old, new in renamed.items():
        values = {name.replace(old, new): each for name, each in values.items()}
    return values | {name: _drawn(shape, at, value) for at, (name, shape) in enumerate(beside.items())}


def _drawn(shape: tuple[int, ...], seed: int, value: float | None) -> np.ndarray[Any, Any]:
    """Return random values, or one value everywhere."""
    if value is not None:
        return np.full(shape, value, np.float32)
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)
