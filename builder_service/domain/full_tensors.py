"""Whole matrices that an adapter carries: copies of the base's own are left out, anything else is refused.

PEFT saves them for ``modules_to_save``, for embeddings that are targeted, and when the vocabulary was resized.
Adapters of one base share its embeddings and its head, so only what changes nothing can be accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from builder_service.domain.grouping import Grouping
from builder_service.domain.safetensors_header import READABLE, Tensor, TensorFile
from builder_service.domain.tensor_names import FullKey, is_embedding
from loramux_shared.faults import Finding
from loramux_shared.wording import listed

PIECE: Final = 1 << 20
"""Elements that are compared at once."""
EMBED_FIX: Final = (
    "Adapters share the base's embeddings and head: merge it (merge_and_unload), or train without "
    "modules_to_save and added tokens."
)
_TIED: Final = {"lm_head": "model.embed_tokens"}
"""Where the base has no head of its own, its embeddings are the head."""


class BaseTensors(Protocol):
    """The base's own tensors."""

    def find(self, name: str) -> TensorFile | None:
        """Return the file that holds a tensor, or None where the base has no such tensor."""
        ...


@dataclass(frozen=True)
class FullTensor:
    """A whole matrix in an adapter's file."""

    key: FullKey
    tensor: Tensor


def check_full_tensors(
    file: TensorFile,
    fulls: list[FullTensor],
    saved: tuple[str, ...],
    base: BaseTensors | None,
    report: Grouping,
) -> tuple[str, ...]:
    """Return the keys of those that equal the base's; report the others, and saved modules without tensors."""
    redundant = []
    for full in fulls:
        problem = _difference(file, full, base)
        if not problem:
            redundant.append(full.tensor.name)
            continue
        code = "E_EMBED" if any(_is_of(full.key.name, module) for module in saved) else full.key.code
        fix = EMBED_FIX if is_embedding(full.key.name) else _saved_fix(full.key.name)
        expected = f"the base's own {full.key.name}.weight, or none"
        report.add(code, full.tensor.name, cause=problem, expected=expected, found=problem, fix=fix)
    for module in saved:
        if not any(_is_of(full.key.name, module) for full in fulls):
            place = "adapter_config.json: modules_to_save"
            fix = EMBED_FIX if is_embedding(module) else _saved_fix(module)
            found = f"{module}, which has no tensors in the file"
            report.add("E_EMBED", place, cause=module, expected="unset", found=found, fix=fix)
    return tuple(sorted(redundant))


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


def _difference(file: TensorFile, full: FullTensor, base: BaseTensors | None) -> str:
    """Return how a matrix differs from the base's; empty where every value is the same."""
    if base is None:
        return "a whole matrix, and no base to compare it with"
    name = f"{full.key.name}.weight"
    found = base.find(name)
    if found is None and full.key.name in _TIED:
        name = f"{_TIED[full.key.name]}.weight"
        found = base.find(name)
    if found is None:
        return "a whole matrix that the base does not have"
    theirs, ours = found.tensors[name], full.tensor
    if ours.shape != theirs.shape:
        return f"shape {list(ours.shape)}, the base has {list(theirs.shape)}"
    if ours.dtype not in READABLE or theirs.dtype not in READABLE:
        return f"{ours.dtype}, the base has {theirs.dtype}"
    pieces = zip(file.pieces(ours.name, PIECE), found.pieces(name, PIECE), strict=True)
    # float32 holds every value of the readable types; comparing bits tells 0 from -0, and a NaN equals itself.
    same = all(
        np.array_equal(a.astype(np.float32).view(np.uint32), b.astype(np.float32).view(np.uint32))
        for a, b in pieces
    )
    return "" if same else "a whole matrix that differs from the base's"


def _is_of(name: str, module: str) -> bool:
    """True when a tensor belongs to a module that ``modules_to_save`` names, as PEFT means it."""
    return f".{module}." in f".{name}."
