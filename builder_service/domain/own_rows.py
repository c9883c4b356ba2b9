"""Rows of embeddings and head that an adapter has in the place of the base's.

``modules_to_save`` has all of a matrix, of which those rows are kept that differ, and
``trainable_token_indices`` some rows alone. Where a base is tied, PEFT (0.21) tells three cases apart: a module
that is saved is untied from the other; rows of ``trainable_token_indices`` are rows of both, unless the config
has others for the head; and with ``ensure_weight_tying``, as for a matrix that the file has though the config
does not name it, both stay one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from builder_service.domain.adapter_config import AdapterConfig, is_end
from builder_service.domain.full_tensors import EMBED_FIX, FullTable
from builder_service.domain.grouping import Grouping
from builder_service.domain.pairs import Pair
from builder_service.domain.peft_kinds.trainable_tokens import TRAINABLE_TOKENS
from builder_service.domain.rules.vectors import report_left_out
from builder_service.domain.safetensors_header import READABLE, Tensor, TensorFile
from builder_service.domain.tensor_names import TokensKey
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bundle.manifest import Replaced
from loramux_shared.bundle.modules import BY_NAME, NO_LAYER, Module
from loramux_shared.bundle.npy import Array

MAX_RUNS: Final = 4096
"""Most runs of rows that differ; with more of them, all rows are kept."""
BOTH: Final = (BY_NAME["embedding"], BY_NAME["head"])
_INDICES: Final = "adapter_config.json: trainable_token_indices"
_AGAIN: Final = "Save the adapter again, or correct trainable_token_indices."
_WHOLE: Final = "Save both whole: modules_to_save with embed_tokens and lm_head."
_ONCE: Final = "It is not clear what PEFT makes of both: merge it (merge_and_unload), or train one of them."
PIECE_ELEMENTS: Final = 1 << 20
"""Elements that are compared at once."""

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PlannedRows:
    """Rows that replace the base's, and the tensor that they are read from."""

    replaced: Replaced
    file: TensorFile
    tensor: str
    rows: Runs
    """Rows of the tensor, in the order of the tokens: from the first up to the second, of each run of them."""


@dataclass(frozen=True)
class ReplacedRows:
    """The rows that replace rows of the base."""

    planned: list[PlannedRows]
    """Rows to write, those of embeddings first."""
    vocab: int | None
    """Tokens of the adapter's model; None: as many as the base has."""


@dataclass(frozen=True)
class TokenTensor:
    """Rows of some tokens in an adapter's file."""

    key: TokensKey
    tensor: Tensor


def plan_rows(
    file: TensorFile,
    tables: list[FullTable],
    tokens: list[TokenTensor],
    pairs: list[Pair],
    config: AdapterConfig,
    base: ModelConfig,
    report: Grouping,
) -> ReplacedRows:
    """Return which rows are replaced; report what PEFT and we would not agree about."""
    found: dict[Module, PlannedRows] = {}
    applied = _applied(file, tables, config, base, report)
    for module, table in applied.items():
        if table.differs.any():
            found[module] = _of_table(file, module, table)
    for each in tokens:
        for module in _modules_of(each, tokens, base):
            planned = _of_tokens(each, file, module, config, base, report)
            if module in found or any(module in pair.key.modules for pair in pairs):
                what = f"{module.hf} both as rows of tokens and otherwise"
                report.add("E_EMBED", each.tensor.name, cause=module, expected="one", found=what, fix=_ONCE)
            elif planned is not None:
                found[module] = planned
    _check_indices(tokens, config, base, report)
    if config.kind is TRAINABLE_TOKENS:
        _check_rows_alone(file, tokens, config, base, report)
    _check_whole(found, pairs, report)
    rows = sorted(found.values(), key=lambda planned: planned.replaced.module_id)
    return ReplacedRows(rows, _vocab_of(applied, base, report))


def _vocab_of(applied: Mapping[Module, FullTable], base: ModelConfig, report: Grouping) -> int | None:
    """Return the tokens of a model whose matrices were resized; a module without one has the base's rows.

    Rows that were cut off are of no use to a model that has no such tokens.
    """
    vocab = base.dims.vocab
    sizes = {table.rows for table in applied.values()}
    if len(applied) < len(BOTH) and max(sizes, default=0) > vocab:
        sizes.add(vocab)
    if not sizes or sizes == {vocab}:
        return None
    names = ", ".join(sorted({table.full.tensor.name for table in applied.values()}))
    if len(sizes) > 1:
        found = f"{' and '.join(map(str, sorted(sizes)))} rows"
        report.add("E_EMBED", names, expected="embeddings and a head of as many rows", found=found, fix=_WHOLE)
    elif max(sizes) > vocab and base.inputs is not None:
        found, expected = f"{max(sizes)} rows", f"at most {vocab}, for which the base has inputs of each layer"
        report.add("E_EMBED", names, expected=expected, found=found, fix=EMBED_FIX)
    return max(sizes)


def _applied(
    file: TensorFile, tables: list[FullTable], config: AdapterConfig, base: ModelConfig, report: Grouping
) -> dict[Module, FullTable]:
    """Return the matrices of those modules that have one of their own, which may equal the base's."""
    apart = [table for table in tables if not base.tied_embeddings or _is_apart(table, config)]
    tied = [table for table in tables if table not in apart]
    if len({table.module for table in tied}) > 1 and not _are_same(file, tied):
        found = "two matrices that differ, of embeddings and head that are tied"
        names = ", ".join(table.full.tensor.name for table in tied)
        report.add("E_EMBED", names, expected="one matrix for both", found=found, fix=_ONCE)
    found_apart = {table.module: table for table in apart}
    of_both = {module: table for table in tied for module in BOTH if module not in found_apart}
    return of_both | found_apart


def _is_apart(table: FullTable, config: AdapterConfig) -> bool:
    return table.saved and not config.ensure_weight_tying


def _are_same(file: TensorFile, tables: list[FullTable]) -> bool:
    first, *others = [table.full.tensor for table in tables]
    return all(_are_equal(file, first, other) for other in others)


def _are_equal(file: TensorFile, one: Tensor, other: Tensor) -> bool:
    pieces = (file.pieces(each.name, PIECE_ELEMENTS) for each in (one, other))
    return one.shape == other.shape and all(
        np.array_equal(a.astype(np.float32), b.astype(np.float32), equal_nan=True)
        for a, b in zip(*pieces, strict=True)
    )


def _of_table(file: TensorFile, module: Module, table: FullTable) -> PlannedRows:
    count, features = table.full.tensor.shape
    runs = _runs(np.flatnonzero(table.differs))
    if len(runs) > MAX_RUNS:
        runs = ((0, count),)
    rows = tuple((first, first + length) for first, length in runs)
    return PlannedRows(_replaced(module, runs, features), file, table.full.tensor.name, rows)


def _modules_of(each: TokenTensor, tokens: list[TokenTensor], base: ModelConfig) -> tuple[Module, ...]:
    """Return whose rows they are: of a tied base also the head's, unless that has some of its own."""
    alone = all(other is each for other in tokens)
    tied = base.tied_embeddings and each.key.module.name == "embedding" and alone
    return BOTH if tied else (each.key.module,)


def _of_tokens(
    each: TokenTensor,
    file: TensorFile,
    module: Module,
    config: AdapterConfig,
    base: ModelConfig,
    report: Grouping,
) -> PlannedRows | None:
    """Return the rows of a tensor by ascending tokens; None where they are not what the config says."""
    indices, hidden = config.indices_of(each.key.name), base.dims.hidden
    shape = (len(indices), hidden)
    if each.tensor.shape != shape:
        report.add(
            "E_EMBED",
            each.tensor.name,
            expected=f"shape {list(shape)}, by trainable_token_indices",
            found=f"shape {list(each.tensor.shape)}",
            fix=_AGAIN,
        )
        return None
    order = np.argsort(np.array(indices, np.int64))
    runs = _runs(np.array(indices, np.int64)[order])
    rows = tuple((int(row), int(row) + 1) for row in order)
    return PlannedRows(_replaced(module, runs, hidden), file, each.tensor.name, rows)


def _check_indices(
    tokens: list[TokenTensor], config: AdapterConfig, base: ModelConfig, report: Grouping
) -> None:
    """Report indices that no tensor has rows for, and those beyond the base's vocabulary or twice."""
    vocab = base.dims.vocab
    there = [each.key.name for each in tokens]
    for name, indices in config.trainable_tokens.items():
        of_all = base.tied_embeddings or config.kind is TRAINABLE_TOKENS
        shared = of_all and any(config.indices_of(key) == indices for key in there)
        if not shared and not any(is_end(name, key) for key in there):
            found = f"{name[:80]}, which has no rows in the file"
            report.add("E_EMBED", _INDICES, cause=name, expected="unset", found=found, fix=_AGAIN)
        beyond = sorted({index for index in indices if not 0 <= index < vocab})
        if beyond or len(set(indices)) < len(indices):
            found = f"{beyond[0]}" if beyond else "one twice"
            expected = f"tokens of the base, each once, below {vocab}"
            report.add("E_EMBED", _INDICES, cause="beyond", expected=expected, found=found, fix=EMBED_FIX)


def _check_rows_alone(
    file: TensorFile, tokens: list[TokenTensor], config: AdapterConfig, base: ModelConfig, report: Grouping
) -> None:
    """Report rows that PEFT drops, and rows of tied embeddings and head that differ."""
    modules = {each.key.module for each in tokens}
    tied = base.tied_embeddings and len(modules) > 1
    for each in tokens:
        field = config.left_out_by(each.key.name)
        if field and not (tied and each.key.module.name == "head"):
            report_left_out(each.tensor.name, field, "rows", config, report)
    rows = [each.tensor for each in tokens if each.tensor.dtype in READABLE]
    if tied and any(not _are_equal(file, rows[0], other) for other in rows[1:]):
        found = "rows that differ, of embeddings and head that are tied"
        report.add("E_EMBED", rows[0].name, expected="the same rows of both", found=found, fix=_ONCE)


def _check_whole(found: dict[Module, PlannedRows], pairs: list[Pair], report: Grouping) -> None:
    """Report factors beside whole matrices, which PEFT has never both of one module."""
    for pair in pairs:
        if pair.key.layer == NO_LAYER and pair.key.modules[0] in found:
            what = "lora_A and lora_B beside rows of its own"
            report.add("E_EMBED", pair.place, expected="one of the two", found=what, fix=_ONCE)


def _replaced(module: Module, runs: Runs, features: int) -> Replaced:
    return Replaced(module_id=module.id, module=module.name, tokens=runs, features=features)


def _runs(tokens: Array) -> Runs:
    """Return ascending numbers as runs: the first, and how many."""
    firsts = np.flatnonzero(np.diff(tokens, prepend=-2) != 1)
    counts = np.diff(firsts, append=len(tokens))
    return tuple(zip(tokens[firsts].tolist(), counts.tolist(), strict=True))
