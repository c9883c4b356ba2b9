"""``adapter_config.json`` as PEFT means it: what is honoured, what is refused by name, which scale results."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from builder_service.domain.config_rules import refusals
from shared.faults import Finding

FILE: Final = "adapter_config.json"
DEFAULT_ALPHA: Final = 8.0
"""PEFT's own."""
MAX_PATTERN: Final = 4096
"""Characters of one pattern."""


@dataclass(frozen=True)
class AdapterConfig:
    """The fields that serving needs."""

    rank: int | None
    """None: not given. PEFT's default is 8, but the tensors are the truth."""
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    target_modules: tuple[str, ...] | None = None
    """Empty where it is not given, None where it is a pattern or ``all-linear``."""
    base_model_name: str = ""
    base_model_class: str = ""

    def rank_of(self, module: str) -> int | None:
        """Return the rank that a module of the base should have, or None where the config does not say."""
        rank: int | None = _match(self.rank_pattern, module, self.rank)
        return rank

    def scale_of(self, module: str, rank: int) -> float:
        """Return alpha/r, or alpha/sqrt(r) with rsLoRA, with the module's own alpha and its own rank."""
        alpha: float = _match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class ParsedConfig:
    """A config and what is wrong with it; config is None where nothing can be made of it."""

    config: AdapterConfig | None
    findings: tuple[Finding, ...]


def parse_config(data: bytes) -> ParsedConfig:
    """Read a config; every violation is found, not only the first."""
    try:
        fields = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return ParsedConfig(None, (_bad("", "a JSON object", f"no valid JSON ({type(error).__name__})"),))
    if not isinstance(fields, dict):
        return ParsedConfig(None, (_bad("", "a JSON object", type(fields).__name__),))
    findings = refusals(fields)
    if any(finding.code in {"E_MLX", "E_NOT_LORA"} for finding in findings):
        return ParsedConfig(None, tuple(findings))
    findings += _bad_fields(fields)
    if any(finding.code == "E_BAD_CONFIG" for finding in findings):
        return ParsedConfig(None, tuple(findings))
    return ParsedConfig(_config(fields), tuple(findings))


def _config(fields: dict[str, Any]) -> AdapterConfig:
    targets = fields.get("target_modules")
    mapping = fields.get("auto_mapping") or {}
    return AdapterConfig(
        rank=fields.get("r"),
        alpha=float(_or(fields.get("lora_alpha"), DEFAULT_ALPHA)),
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
        use_rslora=bool(fields.get("use_rslora")),
        target_modules=None if isinstance(targets, str) else tuple(targets or ()),
        base_model_name=fields.get("base_model_name_or_path") or "",
        base_model_class=str(mapping.get("base_model_class") or "") if isinstance(mapping, dict) else "",
    )


def _bad_fields(fields: dict[str, Any]) -> list[Finding]:
    found = []
    for key, check, expected in (
        ("r", _is_rank, "a positive integer"),
        ("lora_alpha", _is_alpha, "a positive number"),
        ("use_rslora", lambda value: isinstance(value, bool), "true or false"),
        ("target_modules", _is_targets, "a list of names or a pattern"),
        ("base_model_name_or_path", lambda value: isinstance(value, str), "a name"),
    ):
        value = fields.get(key)
        if value is not None and not check(value):
            found.append(_bad(key, expected, _short(value)))
    for key, check, expected in (
        ("rank_pattern", _is_rank, "a positive integer"),
        ("alpha_pattern", _is_alpha, "a positive number"),
    ):
        patterns = fields.get(key) or {}
        if not isinstance(patterns, dict):
            found.append(_bad(key, "an object", _short(patterns)))
            continue
        for pattern, value in patterns.items():
            if not check(value):
                found.append(_bad(f"{key}.{pattern}", expected, _short(value)))
            if problem := _pattern_problem(pattern):
                found.append(_bad(key, "a regular expression", f"{_short(pattern)} ({problem})"))
    return found


def _match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's ``get_pattern_key``: the first pattern, in the file's order, that matches the end of a name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _pattern_problem(pattern: str) -> str:
    if len(pattern) > MAX_PATTERN:
        return f"longer than {MAX_PATTERN} characters"
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return ""


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30


def _is_targets(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _bad(where: str, expected: str, found: str) -> Finding:
    place = ": ".join(part for part in (FILE, where) if part)
    return Finding(code="E_BAD_CONFIG", where=place, expected=expected, found=found, fix="Correct the file.")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
