"""Adapters that another TensorRT-LLM converter has turned into npy files: the same rules, other containers.

Rows become tensors in PEFT's names that lie where they are in the weights file, so nothing is copied. Scales
are in B already, and magnitudes of DoRA are divided by the norms of their rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Final

import numpy as np

from builder_service.domain.adapter_config import AdapterConfig
from builder_service.domain.grouping import Grouping
from builder_service.domain.peft_names import ALL_LINEAR
from builder_service.domain.rules.checked import CheckedAdapter, Rulebook
from builder_service.domain.rules.tensor_passes import TensorCheck, check_tensors
from builder_service.domain.safetensors_header import READABLE, Tensor, TensorFile
from loramux_shared.adapter_files import KEYS_FILE
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bundle.manifest import CONFIG_FILE, WEIGHTS_FILE, Coverage
from loramux_shared.bundle.modules import BY_ID, FUSED, OF_EXPERTS, Module
from loramux_shared.bundle.npy import Array, Header, parse_header
from loramux_shared.faults import BundleCorrupt, Finding

CONFIG_FILES: Final = (CONFIG_FILE, KEYS_FILE)
MAX_HEADER_BYTES: Final = 4096
MAX_ROWS: Final = 100_000
PIECE_BYTES: Final = 1 << 20
"""Bytes of padding that are looked at at once."""
# numpy writes bfloat16 as 2-byte voids, from a void type as "|V2" and from ml_dtypes as "<V2".
_DTYPES: Final = {"<f2": "F16", "<f4": "F32", "|V2": "BF16", "<V2": "BF16"}
_UNSERVED: Final = {
    8: "cross_attn_qkv", 9: "cross_attn_q", 10: "cross_attn_k", 11: "cross_attn_v", 12: "cross_attn_dense",
    13: "moe_h_to_4h", 14: "moe_4h_to_h", 15: "moe_gate", 16: "moe_router", 17: "mlp_router",
    19: "shared_expert_h_to_4h", 20: "shared_expert_4h_to_h", 21: "shared_expert_gate",
}  # fmt: skip
# The modules of a row in the order of B's rows. attn_qkv is [q; k; v]; mlp_gate_up is [up; gate], for
# TensorRT-LLM's converters swap the halves of gate_up_proj.
_FUSED_ROWS: Final = {0: FUSED["qkv_proj"], 18: tuple(reversed(FUSED["gate_up_proj"]))}
_GATE_UP: Final = 18
_MERGE: Final = "Merge it into the base and serve a full model."
_AGAIN: Final = "Convert the adapter again, or name the PEFT repository that it was made from."


class FoldedConfig(AdapterConfig):
    """The config of an adapter whose B is scaled already, and whose ranks only its rows have."""

    def ranks_of(self, module: str) -> tuple[int, ...]:
        """Unknown."""
        del module
        return ()

    def scale_of(self, module: str, rank: int) -> float:
        """Nothing is left to do."""
        del module, rank
        return 1.0


FOLDED: Final = FoldedConfig(
    rank=0, alpha=1.0, target_modules=ALL_LINEAR, use_dora=None, lora_bias=None, normalised=True
)


@dataclass(frozen=True)
class NpyAdapter:
    """The rows of two npy files as tensors in PEFT's names, or what is wrong with them."""

    file: TensorFile | None
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class _Row:
    index: int
    module_id: int
    layer: int
    rank: int
    dora: bool
    """True if magnitudes, divided by the norms already, stand behind B."""
    features: tuple[tuple[int, int], ...] = ()
    """(in, out) of each of its modules in the base."""

    @property
    def modules(self) -> tuple[Module, ...]:
        return _FUSED_ROWS.get(self.module_id) or (BY_ID[self.module_id],)

    @property
    def features_in(self) -> int:
        return self.features[0][0]

    @property
    def outs(self) -> tuple[int, ...]:
        return tuple(out for _, out in self.features)

    @property
    def length(self) -> int:
        """Elements that it has."""
        return self.rank * (self.features_in + sum(self.outs)) + self.dora * sum(self.outs)

    def placed(self, base: ModelConfig) -> _Row | None:
        """Return the row with the shapes of its modules; None where the base has no such place."""
        found = [base.features(module.name, self.layer) for module in self.modules]
        there = tuple(each for each in found if each is not None)
        return replace(self, features=there) if len(there) == len(found) else None


@dataclass(frozen=True)
class _Table:
    """The places of rows in the weights file."""

    path: Path
    dtype: str
    rows: int
    width: int
    offset: int

    @property
    def itemsize(self) -> int:
        return int(READABLE[self.dtype].itemsize)

    def at(self, row: int, element: int) -> int:
        return self.offset + (row * self.width + element) * self.itemsize


def check(folder: Path, rules: Rulebook, advance: Callable[[int], None]) -> CheckedAdapter:
    """Check the files of a folder as tensors of an adapter; advance counts bytes that were read."""
    opened = open_check(folder, rules, advance)
    if isinstance(opened, CheckedAdapter):
        return opened
    return replace(check_tensors(opened), coverage=Coverage())  # the tensors' names are ours, not the adapter's


def open_check(
    folder: Path, rules: Rulebook, advance: Callable[[int], None] = lambda _: None
) -> TensorCheck | CheckedAdapter:
    """Return the check of the rows of a folder as tensors, or why there are none to check."""
    npy = read_npy_adapter(folder, rules.limits.base)
    if npy.file is None:
        return CheckedAdapter(npy.findings)
    return TensorCheck(npy.file, FOLDED, rules, advance, list(npy.findings))


def read_npy_adapter(folder: Path, base: ModelConfig) -> NpyAdapter:
    """Read a folder with the two files; sizes, dims and values are for the rules of all adapters to check."""
    config_path = next(folder / name for name in CONFIG_FILES if (folder / name).exists())
    try:
        table = _table(folder / WEIGHTS_FILE)
        config = _config(config_path, table.rows)
    except BundleCorrupt as error:
        where, _, problem = error.message.partition(": ")
        return NpyAdapter(None, (_bad_npy(where, problem),))
    report = Grouping()
    rows = [row for row in _rows(config, base, report) if _is_sound(row, table, report)]
    found = report.findings()
    if any(not finding.code.startswith("W_") for finding in found):
        return NpyAdapter(None, tuple(found))
    tensors = [tensor for row in rows for tensor in _tensors(row, table)]
    return NpyAdapter(TensorFile(table.path, {tensor.name: tensor for tensor in tensors}), tuple(found))


def _table(path: Path) -> _Table:
    header, shape = _header(path)
    if header.descr not in _DTYPES:
        raise BundleCorrupt(f"{path.name}: expected float16, float32 or bfloat16 bits, found {header.descr}")
    dtype = _DTYPES[header.descr]
    _expect_size(path, header, READABLE[dtype].itemsize)
    return _Table(path, dtype, *shape, header.offset)


def _config(path: Path, rows: int) -> Array:
    header, shape = _header(path)
    if header.descr != "<i4" or shape[0] != rows or shape[1] not in (3, 4):
        raise BundleCorrupt(
            f"{path.name}: expected int32 of shape ({rows}, 3 or 4), found {header.descr} of shape {shape}"
        )
    _expect_size(path, header, 4)
    values: Array = np.fromfile(path, np.dtype("<i4"), offset=header.offset).reshape(shape)
    return values if shape[1] == 4 else np.pad(values, ((0, 0), (0, 1)))


def _header(path: Path) -> tuple[Header, tuple[int, int]]:
    """Return a header and the shape without the batch dimension, which some converters leave out."""
    with path.open("rb") as file:
        header = parse_header(file.read(MAX_HEADER_BYTES), path.name)
    shape = header.shape[1:] if len(header.shape) == 3 and header.shape[0] == 1 else header.shape
    if len(shape) != 2 or 0 in shape or shape[0] > MAX_ROWS:
        raise BundleCorrupt(f"{path.name}: expected shape (1, rows, columns), found {header.shape}")
    return header, (shape[0], shape[1])


def _expect_size(path: Path, header: Header, itemsize: int) -> None:
    expected, found = header.offset + int(np.prod(header.shape, dtype=object)) * itemsize, path.stat().st_size
    if found != expected:
        raise BundleCorrupt(f"{path.name}: expected {expected} bytes for shape {header.shape}, found {found}")


def _rows(config: Array, base: ModelConfig, report: Grouping) -> Iterator[_Row]:
    """Yield the rows of modules that are served; report the others."""
    seen: Counter[tuple[int, int]] = Counter()
    served = {*BY_ID, *_FUSED_ROWS} - OF_EXPERTS  # rows of experts do not name the expert
    for index, values in enumerate(config.tolist()):
        module_id, layer, rank, is_dora = values
        place = f"row {index}"
        if is_dora not in (0, 1):
            report.add("E_BAD_NPY", place, expected="is_dora 0 or 1", found=str(is_dora), fix=_AGAIN)
            continue
        if module_id not in served:
            name = _UNSERVED.get(module_id, "not a module of TensorRT-LLM")
            code = "E_MOE" if "moe" in name or "expert" in name or "router" in name else "E_MODULE"
            found, ids = f"{module_id} ({name})", ", ".join(map(str, sorted(served)))
            fix = f"Leave these rows out of the training, or: {_MERGE}"
            report.add(code, place, cause=module_id, expected=f"module ids {ids}", found=found, fix=fix)
            continue
        if rank < 1 or layer < 0:
            report.add("E_BAD_NPY", place, expected="a layer and a rank", found=f"{layer}, {rank}", fix=_AGAIN)
            continue
        row = _Row(index, module_id, layer, rank, bool(is_dora))
        places = [(layer, module.id) for module in row.modules]
        if any(seen[item] for item in places):
            fix = "Files of two adapters were merged, or a fused row stands beside its parts."
            expected, found = f"layer {layer} {row.modules[0].name} once", "twice"
            report.add("E_PAIR", place, cause=module_id, expected=expected, found=found, fix=fix)
        seen.update(places)
        placed = row.placed(base)
        if placed is not None:
            yield placed
            continue
        beyond = layer >= base.dims.num_layers
        expected = f"layers 0 to {base.dims.num_layers - 1}" if beyond else "a module that the layer has"
        fix = "The adapter is for another base."
        found = f"layer {layer} {row.modules[0].name}"
        report.add("E_LAYER" if beyond else "E_MODULE", place, expected=expected, found=found, fix=fix)


def _is_sound(row: _Row, table: _Table, report: Grouping) -> bool:
    """Check that a row holds what its dims say and zeros behind it."""
    length = row.length
    name = "+".join(module.name for module in row.modules)
    if length > table.width:
        report.add(
            "E_DIMS",
            f"row {row.index}",
            cause=row.module_id,
            expected=f"{length} elements for {name} of rank {row.rank} in this base",
            found=f"rows of {table.width}",
            fix="The adapter was converted for another base.",
        )
        return False
    if not _is_zero(table, row.index, length, table.width):
        report.add(
            "E_DIMS",
            f"row {row.index}",
            cause=row.module_id,
            expected=f"zeros after element {length} of {name} of rank {row.rank}",
            found="other values",
            fix="The adapter was converted for another base, or the row holds more than it says.",
        )
        return False
    if lower := _lower_rank(row, table):
        report.add(
            "E_RANK_SHAPE",
            f"row {row.index}",
            cause=(row.module_id, row.rank),
            expected=f"numbers up to element {length} of {name}, which says rank {row.rank}",
            found=f"zeros, as after rank {lower}",
            fix=f"Correct its rank, or leave the row out if its B is zero. {_AGAIN}",
        )
        return False
    if row.module_id == _GATE_UP:
        report.add("W_GATE_UP", f"row {row.index}", expected="[up; gate]", found=_ORDER_IS_NOT_RECORDED)
    return True


_ORDER_IS_NOT_RECORDED: Final = (
    "the order of the halves is not recorded; taken as TensorRT-LLM's converters write"
)


def _lower_rank(row: _Row, table: _Table) -> int:
    """Return the rank that a row has, if it claims another one over padding; else 0.

    Read with a rank too high, the first rows of B would be the last of A, and the padding the end of B. A row
    of zeros is what it says, and so is a fused one whose last parts are not adapted.
    """
    unit = row.features_in + sum(row.outs)
    if row.rank == 1 or not _is_zero(table, row.index, (row.rank - 1) * unit, row.rank * unit):
        return 0
    kind = f"u{table.itemsize}"
    values = np.fromfile(table.path, kind, row.rank * unit, offset=table.at(row.index, 0))
    end = int(np.flatnonzero(values)[-1]) + 1 if values.any() else 0
    ends = [0, *(row.rank * (row.features_in + out) for out in accumulate(row.outs))]
    return 0 if any(at - row.rank < end <= at for at in ends) else -(-end // unit)


def _is_zero(table: _Table, row: int, start: int, stop: int) -> bool:
    """Return True where the elements of a row from start up to stop are zeros."""
    offset, left = table.at(row, start), (stop - start) * table.itemsize
    while left:
        count = min(left, PIECE_BYTES)
        if np.fromfile(table.path, np.uint8, count, offset=offset).any():
            return False
        offset, left = offset + count, left - count
    return True


def _tensors(row: _Row, table: _Table) -> Iterator[Tensor]:
    """Yield the tensors of each module of a row; those of a fused row share A, and have B's rows in turn."""
    first, behind = row.rank * row.features_in, row.rank * (row.features_in + sum(row.outs))
    for module, out in zip(row.modules, row.outs, strict=True):
        name = f"base_model.model.model.layers.{row.layer}.{module.path}.lora_"
        yield _tensor(f"{name}A.weight", table, row.index, 0, (row.rank, row.features_in))
        yield _tensor(f"{name}B.weight", table, row.index, first, (out, row.rank))
        first += out * row.rank
        if row.dora:
            yield _tensor(f"{name}magnitude_vector", table, row.index, behind, (out,))
            behind += out


def _tensor(name: str, table: _Table, row: int, element: int, shape: tuple[int, ...]) -> Tensor:
    size = math.prod(shape) * table.itemsize
    return Tensor(name, table.dtype, shape, table.at(row, element), size)


def _bad_npy(where: str, problem: str) -> Finding:
    expected, _, found = problem.removeprefix("expected ").partition(", found ")
    return Finding(code="E_BAD_NPY", where=where, expected=expected, found=found[:200], fix=_AGAIN)
