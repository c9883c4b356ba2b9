"""Whole matrices that an adapter carries: copies of the base's own are left out.

PEFT saves them for ``modules_to_save``, for embeddings that are targeted, and when the vocabulary was resized.
Of embeddings and head an adapter may have rows of its own; of anything else only what changes nothing can be
accepted.
"""

import math
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from builder_service.domain.grouping import Grouping
from builder_service.domain.safetensors_header import READABLE, Tensor, TensorFile
from builder_service.domain.tensor_names import FullKey, is_embedding
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bundle.modules import Module
from loramux_shared.bundle.npy import Array
from loramux_shared.faults import Finding
from loramux_shared.wording import listed

_UNUSED: Final = ".original_module."
"""Part of the names of PEFT's copies beside modules that are saved whole; a resized one has new rows too."""
PIECE_ELEMENTS: Final = 1 << 20
"""Elements that are compared at once."""
EMBED_FIX: Final = (
    "Save embeddings and head whole (modules_to_save), with the tokenizer beside them; or merge the adapter "
    "(merge_and_unload), or train without added tokens."
)
BIAS_FIX: Final = (
    "Biases of the linears of layers are served, where the base has some: train with bias lora_only, or merge "
    "it into the base (merge_and_unload) and serve a full model."
)


class BaseTensors(Protocol):
    """The base's own tensors."""

    def find(self, name: str) -> TensorFile | None:
        """Return the file that holds a tensor, or None where the base has no such tensor."""
        ...

    def widen(self, name: str, shape: tuple[int, int]) -> TensorFile | None:
        """Return a file with a weight of few bits in float32, which goes with the object.

        None where the base has none of this name, or nothing here can widen it.
        """
        ...


@dataclass(frozen=True)
class FullTensor:
    """A whole matrix in an adapter's file."""

    key: FullKey
    tensor: Tensor


@dataclass(frozen=True)
class FullTable:
    """Embeddings or a head that an adapter has in the place of the base's."""

    full: FullTensor
    module: Module
    saved: bool
    """True if the config names it; else the base's tensors were saved with the adapter."""
    differs: Array
    """[rows]: which are other ones than the base's; all of those that the base does not have."""

    @property
    def rows(self) -> int:
        """Return the number of rows of the matrix: the tokens of its model."""
        return len(self.differs)


@dataclass(frozen=True)
class FullTensors:
    """The whole matrices of an adapter that are served; all others were reported."""

    redundant: tuple[str, ...]
    """Keys of those that equal the base's, sorted."""
    tables: list[FullTable]
    """Also those that equal the base's."""


def check_full_tensors(
    file: TensorFile,
    fulls: list[FullTensor],
    saved: tuple[str, ...],
    model: ModelConfig,
    base: BaseTensors | None,
    report: Grouping,
) -> FullTensors:
    """Compare whole matrices with the base's; report those that differ and are not served, and missing ones."""
    redundant, tables = [], []
    for full in fulls:
        problem, differs = _compare(file, full, model, base)
        named = any(_is_of(full.key.name, module) for module in saved)
        module = None if full.key.of_base else full.key.module
        if differs is not None and module is not None:
            tables.append(FullTable(full, module, named, differs))
        if not problem:
            redundant.append(full.tensor.name)
        elif differs is None or module is None:
            _report_change(full, problem, report, named=named)
    for name in saved:
        if not any(_is_of(full.key.name, name) for full in fulls):
            _report_missing(name, report)
    return FullTensors(tuple(sorted(redundant)), tables)


def _report_change(full: FullTensor, problem: str, report: Grouping, *, named: bool) -> None:
    """Report a matrix that is not the base's own; named: the config saves its module."""
    code = "E_EMBED" if named else full.key.code
    fix = BIAS_FIX if full.key.kind == "bias" else _fix_of(full.key.name)
    expected = f"the base's own {full.key.tensor}, or none"
    report.add(code, full.tensor.name, cause=problem, expected=expected, found=problem, fix=fix)


def _report_missing(name: str, report: Grouping) -> None:
    """Report a module that the config saves, and that has no tensors."""
    place, found = "adapter_config.json: modules_to_save", f"{name}, which has no tensors in the file"
    report.add("E_EMBED", place, cause=name, expected="unset", found=found, fix=_fix_of(name))


def _fix_of(name: str) -> str:
    """Return how to serve an adapter that has a module of its own."""
    return EMBED_FIX if is_embedding(name) else _saved_fix(name)


def _saved_fix(name: str) -> str:
    return (
        f"Adapters share the base's {name[:80]}: merge it (merge_and_unload), or train without it in "
        "modules_to_save and target_modules; if it was not trained, save the adapter's tensors alone."
    )


def redundant_warning(redundant: tuple[str, ...]) -> list[Finding]:
    """Return the warning about copies that were left out."""
    if not redundant:
        return []
    where, fix = listed(redundant, 3), "Nothing is lost. Save without modules_to_save for a smaller file."
    return [Finding(code="W_REDUNDANT_EMBED", where=where, found="equal to the base's own, left out", fix=fix)]


def _compare(
    file: TensorFile, full: FullTensor, model: ModelConfig, base: BaseTensors | None
) -> tuple[str, Array | None]:
    """Return how a matrix differs from the base's, and in which rows; empty where every value is the same.

    Without rows it cannot be compared.
    """
    if base is None:
        return "a whole matrix, and no base to compare it with", None
    what = "a bias" if full.key.kind == "bias" else "a whole matrix"
    found, name = base_tensor(full.key, model, base)
    if found is None:
        return f"{what} that the base does not have", None
    theirs, ours = found.tensors[name], full.tensor
    unused = _UNUSED in full.tensor.name
    resized = full.key.module is not None and (unused or not full.key.of_base)
    if ours.shape[1:] != theirs.shape[1:] or not ours.size or (ours.shape != theirs.shape and not resized):
        return f"shape {list(ours.shape)}, the base has {list(theirs.shape)}", None
    if ours.dtype not in READABLE or theirs.dtype not in READABLE:
        return f"{ours.dtype}, the base has {theirs.dtype}", None
    width = max(1, math.prod(ours.shape[1:]))
    step = max(1, PIECE_ELEMENTS // width) * width
    rows = (0, min(ours.shape[0], theirs.shape[0])) if resized else None
    pieces = zip(file.pieces(ours.name, step, rows), found.pieces(name, step, rows), strict=True)
    differs = np.concatenate([_differs(a, b, width) for a, b in pieces])
    differs = np.pad(differs, (0, ours.shape[0] - len(differs)), constant_values=not unused)
    return f"{what} that differs from the base's" if differs.any() else "", differs


def base_tensor(key: FullKey, model: ModelConfig, base: BaseTensors | None) -> tuple[TensorFile | None, str]:
    """Return the file that holds the base's tensor of a key, and its name there; None where there is none."""
    if base is None:
        return None, ""
    there = ((base.find(name), name) for name in _names(key, model))
    return next((pair for pair in there if pair[0] is not None), (None, ""))


def _names(key: FullKey, model: ModelConfig) -> list[str]:
    """Return what the base may call a tensor: adapters have names of the model, checkpoints older ones."""
    names, embeddings = [key.name], [f"{prefix}{model.names.embedding}" for prefix in model.names.prefixes]
    if key.module is not None:
        names += [*model.names.heads, *embeddings] if key.module.name == "head" else embeddings
    return [f"{name}.{key.kind}" for name in dict.fromkeys(names)]


def _differs(ours: Array, theirs: Array, width: int) -> Array:
    """Return which rows differ in a bit of a value: that tells 0 from -0, and a NaN equals itself.

    float32 holds every value of the readable types.
    """
    a, b = (values.astype(np.float32).view(np.uint32).reshape(-1, width) for values in (ours, theirs))
    found: Array = (a != b).any(axis=1)
    return found


def _is_of(name: str, module: str) -> bool:
    """Return True if a tensor belongs to a module that ``modules_to_save`` names, as PEFT means it."""
    return f".{module}." in f".{name}."
