"""All rules about one adapter: every violation at once, or the rows of its bundle."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from builder_service.domain.adapter_config import AdapterConfig, parse_config
from builder_service.domain.file_rules import CONFIG, WEIGHTS
from builder_service.domain.grouping import Grouping
from builder_service.domain.safetensors_header import HeaderInvalid, TensorFile, read_header
from builder_service.domain.tensor_rules import EMPTY_FIX, Limits, Pair, check_pairs, pair_up, plan
from builder_service.domain.value_rules import check_values
from shared.bundle.manifest import Row
from shared.bundle.modules import BY_NAME
from shared.deployment import Dtype
from shared.faults import Finding

MAX_CONFIG: Final = 4 << 20
"""Bytes of a config."""


@dataclass(frozen=True)
class PlannedRow:
    """A row of a bundle and the tensors that it is made from."""

    row: Row
    a: str
    b: str


@dataclass(frozen=True)
class CheckedAdapter:
    """What was found in an adapter; without errors, also what its bundle will hold."""

    findings: tuple[Finding, ...]
    file: TensorFile | None = None
    rows: tuple[PlannedRow, ...] = ()
    base_model_name: str = ""

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings for which the adapter is refused."""
        return tuple(item for item in self.findings if not item.code.startswith("W_"))


@dataclass(frozen=True)
class Rulebook:
    """The base and the deployment that adapters must fit."""

    limits: Limits
    architectures: tuple[str, ...]
    """Of the base, for example ``LlamaForCausalLM``."""
    dtype: Dtype
    """The storage type of the bundles."""


def check_adapter(
    folder: Path, book: Rulebook, progress: Callable[[int], None] = lambda _: None
) -> CheckedAdapter:
    """Check a folder that holds a config and weights."""
    data = (folder / CONFIG).read_bytes()
    if len(data) > MAX_CONFIG:
        return CheckedAdapter((_oversized(len(data)),))
    parsed = parse_config(data)
    if any(finding.code in {"E_MLX", "E_NOT_LORA"} for finding in parsed.findings):
        return CheckedAdapter(parsed.findings)
    try:
        file = read_header(folder / WEIGHTS)
    except HeaderInvalid as error:
        return CheckedAdapter((*parsed.findings, _no_header(folder / WEIGHTS, str(error))))
    # A config that says nothing lets every rule about the tensors alone speak too.
    config = parsed.config or AdapterConfig(rank=None, alpha=1.0, target_modules=None)
    found = [*parsed.findings, *_base_findings(config, book)]
    if not file.tensors:
        return CheckedAdapter((*found, _nothing(config)))
    report = Grouping()
    pairs = pair_up(file, report)
    check_pairs(pairs, config, book.limits, report)
    warnings = check_values(file, pairs, config, book.dtype, report, progress)
    found += report.findings()
    if found:
        return CheckedAdapter(tuple(found), file)
    warnings += _shape_warnings(pairs, config, book)
    rows = [
        PlannedRow(row, pair.a.name, pair.b.name) for row, pair in zip(plan(pairs, config), pairs, strict=True)
    ]
    return CheckedAdapter(tuple(warnings), file, tuple(rows), config.base_model_name)


def base_warning(adapter_says: str, base: str) -> Finding | None:
    """Return a warning when an adapter names another base than the one it will run on; its shapes fit."""
    if adapter_says and _plain_name(adapter_says) == _plain_name(base):
        return None
    fix = "Its shapes fit. Make sure that it was trained on this base."
    found = adapter_says or "no name"
    return Finding(
        code="W_BASE", where=f"{CONFIG}: base_model_name_or_path", expected=base, found=found, fix=fix
    )


def _plain_name(name: str) -> str:
    """The last part of a repository or path, without what quantised copies add."""
    last = name.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"(-unsloth)?(-bnb-4bit)?$", "", last)


def _base_findings(config: AdapterConfig, book: Rulebook) -> list[Finding]:
    """A class of another family is another base, whatever its name."""
    said = _family(config.base_model_class)
    if not said or not book.architectures or said in map(_family, book.architectures):
        return []
    return [
        Finding(
            code="E_BASE",
            where=f"{CONFIG}: auto_mapping.base_model_class",
            expected=", ".join(book.architectures),
            found=config.base_model_class,
            fix="The adapter was trained on another base.",
        )
    ]


def _family(architecture: str) -> str:
    return re.sub(r"(For[A-Z]\w*|LMHeadModel|Model)$", "", architecture)


def _shape_warnings(pairs: list[Pair], config: AdapterConfig, book: Rulebook) -> list[Finding]:
    dims, found = book.limits.dims, []
    heads = dims.num_heads * dims.head_dim
    modules = {pair.key.module.hf for pair in pairs}
    if "o_proj" in modules and heads != dims.hidden:
        found.append(
            Finding(
                code="W_ODENSE",
                where=BY_NAME["attn_dense"].hf,
                expected=f"heads * head_dim = hidden {dims.hidden}",
                found=str(heads),
                fix="loramux serves it; TensorRT-LLM could not read these rows.",
            )
        )
    if config.rank is None:
        ranks = ", ".join(sorted({str(pair.a.shape[0]) for pair in pairs}))
        found.append(
            Finding(code="W_RANK", where=f"{CONFIG}: r", expected="a rank", found=f"none; tensors: {ranks}")
        )
    missing = [name for name in config.target_modules or () if name.rpartition(".")[2] not in modules]
    if missing:
        found.append(
            Finding(
                code="W_TARGETS",
                where=f"{CONFIG}: target_modules",
                expected="tensors of each",
                found=f"none of {', '.join(missing[:5])}",
            )
        )
    return found


def _nothing(config: AdapterConfig) -> Finding:
    if config.target_modules == ():
        fix = "The adapter targets no modules: train it again with target_modules."
        return Finding(
            code="E_EMPTY_TARGETS", where=f"{CONFIG}: target_modules", found="none, and no tensors", fix=fix
        )
    return Finding(code="E_EMPTY_WEIGHTS", where=WEIGHTS, expected="tensors", found="none", fix=EMPTY_FIX)


def _no_header(path: Path, problem: str) -> Finding:
    fix = "The file is cut off or no safetensors file: download or save it again."
    return Finding(
        code="E_BAD_WEIGHTS", where=path.name, expected="a safetensors file", found=problem[:300], fix=fix
    )


def _oversized(size: int) -> Finding:
    return Finding(
        code="E_BAD_CONFIG", where=CONFIG, expected=f"at most {MAX_CONFIG} bytes", found=f"{size} bytes"
    )
