"""All rules about one adapter: every violation at once, or the rows of its bundle."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from builder_service.domain.adapter_config import AdapterConfig, parse_config
from builder_service.domain.config_fields import bad_config
from builder_service.domain.grouping import MAX_PLACE_CHARACTERS
from builder_service.domain.rules.checked import CheckedAdapter, Rulebook
from builder_service.domain.rules.config import INVOCATION
from builder_service.domain.rules.tensor_passes import TensorCheck, check_tensors, empty_finding
from builder_service.domain.safetensors_header import HeaderInvalid, TooManyTensors, read_weights
from loramux_shared.adapter_files import CONFIG, WEIGHTS
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.families import load_families
from loramux_shared.faults import Finding
from loramux_shared.untrusted_json import excerpt
from loramux_shared.wording import listed

MAX_CONFIG_BYTES: Final = 4 << 20
"""Largest config."""
MAX_TENSORS: Final = 1 << 14
"""Most tensors of an adapter: A and B of seven modules in 1,170 layers. The deepest model here needs 1,764."""


def check_adapter(
    folder: Path, rules: Rulebook, advance: Callable[[int], None] = lambda _: None
) -> CheckedAdapter:
    """Check a folder that holds a config and weights; advance counts bytes that were read."""
    opened = open_check(folder, rules, advance)
    return opened if isinstance(opened, CheckedAdapter) else check_tensors(opened)


def open_check(
    folder: Path, rules: Rulebook, advance: Callable[[int], None] = lambda _: None
) -> TensorCheck | CheckedAdapter:
    """Return the check of the tensors of a folder, or why there are none to check."""
    size = (folder / CONFIG).stat().st_size
    if size > MAX_CONFIG_BYTES:
        return CheckedAdapter((bad_config("", f"at most {MAX_CONFIG_BYTES} bytes", f"{size} bytes"),))
    parsed = parse_config((folder / CONFIG).read_bytes())
    if any(finding.code in {"E_MLX", "E_NOT_LORA"} for finding in parsed.findings):
        return CheckedAdapter(parsed.findings)
    findings, base = list(parsed.findings), rules.limits.base
    # A config that says nothing lets every rule about the tensors alone speak too.
    config = parsed.config or AdapterConfig(
        kind=parsed.kind, rank=None, alpha=1.0, use_dora=None, lora_bias=None
    )
    try:
        file = read_weights(folder, most_tensors(base))
    except TooManyTensors as error:
        return CheckedAdapter((*findings, *config.read(())[1], too_many(str(error), base)))
    except HeaderInvalid as error:
        return CheckedAdapter((*findings, *config.read(())[1], _no_header(str(error))))
    findings += [*_base_findings(config, rules), *invocation_findings(config, base)]
    if parsed.config is not None:
        architecture = load_families()[base.architecture][0]
        config, wrong = config.with_default_targets(architecture.model_type)
        findings += wrong
    if not file.tensors:
        return CheckedAdapter((*findings, empty_finding(config)))
    return TensorCheck(file, config, rules, advance, findings)


def _base_findings(config: AdapterConfig, rules: Rulebook) -> list[Finding]:
    """A class of another family is another base, whatever its name."""
    family = _family(config.base_model_class[:MAX_PLACE_CHARACTERS])
    if not family or not rules.architectures or family in map(_family, rules.architectures):
        return []
    return [
        Finding(
            code="E_BASE",
            where=f"{CONFIG}: auto_mapping.base_model_class",
            expected=", ".join(rules.architectures),
            found=excerpt(config.base_model_class),
            fix="The adapter was trained on another base.",
        )
    ]


def invocation_findings(config: AdapterConfig, base: ModelConfig) -> list[Finding]:
    """Return findings about invocation tokens that the base lacks.

    No prompt would ever activate the adapter.
    """
    foreign = [str(token)[:20] for token in config.invocation_tokens if token >= base.dims.vocab]
    if not foreign:
        return []
    fix = "The adapter was trained with another tokenizer."
    expected = f"ids below {base.dims.vocab}, the base's vocabulary"
    where = f"{CONFIG}: {INVOCATION}"
    return [Finding(code="E_ALORA", where=where, expected=expected, found=listed(foreign, 5), fix=fix)]


def _family(architecture: str) -> str:
    return re.sub(r"(For[A-Z]\w*|LMHeadModel|Model)$", "", architecture)


def most_tensors(base: ModelConfig) -> int:
    """Return how many tensors an adapter may have: A and B of all modules, and some more."""
    modules = sum(len(group.modules) for groups in base.layer_groups for group in groups)
    return max(MAX_TENSORS, 3 * modules)


def too_many(count: str, base: ModelConfig, where: str = WEIGHTS) -> Finding:
    """Return what is wrong with so many tensors."""
    fix = "Only adapters of experts have so many, and the base has none: merge it, or take the right base."
    most = f"at most {most_tensors(base)} tensors"
    return Finding(code="E_TENSORS", where=where, expected=most, found=count, fix=fix)


def _no_header(problem: str) -> Finding:
    fix = "The file is truncated, or not a safetensors file: download or save it again."
    return Finding(
        code="E_BAD_WEIGHTS", where=WEIGHTS, expected="a safetensors file", found=problem[:300], fix=fix
    )
