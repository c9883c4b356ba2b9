"""``adapter_config.json`` as PEFT means it: what is honoured, what is refused by name, which scale results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from builder_service.domain.config_fields import ALL_LINEAR, bad_config, bad_fields, unknown_fields
from builder_service.domain.config_rules import refusals
from builder_service.domain.patterns import TIME_LIMIT_S, Matcher, PatternsTooSlow
from builder_service.domain.strict_json import JsonInvalid, parse, shown
from shared.faults import Finding

DEFAULT_ALPHA: Final = 8.0
"""PEFT's own."""


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
    target_pattern: str = ""
    """Empty where it is no pattern."""
    modules_to_save: tuple[str, ...] = ()
    base_model_name: str = ""
    base_model_revision: str = ""
    base_model_class: str = ""

    def ranks_of(self, module: str) -> tuple[int, ...]:
        """Return the ranks that a module of the base may have; none where the config does not say.

        They are several where several patterns match: PEFT takes the first, but sorts the patterns when it
        saves them, so the file does not tell which was the first when the adapter was trained.
        """
        return self._ranks.find(module) or (() if self.rank is None else (self.rank,))

    def alphas_of(self, module: str) -> tuple[float, ...]:
        """Return the alphas that a module of the base may have, for the same reason; PEFT loads the first."""
        return self._alphas.find(module) or (self.alpha,)

    def scale_of(self, module: str, rank: int) -> float:
        """Return alpha/r, or alpha/sqrt(r) with rsLoRA, with the module's own alpha and its own rank."""
        return self.alphas_of(module)[0] / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """True when ``target_modules`` names a module of the base, as PEFT means it."""
        if self.target_pattern:
            return bool(self._targets.find(module))
        if self.target_modules is None:
            return True
        return any(module == name or module.endswith(f".{name}") for name in self.target_modules)

    def match_all(self, modules: Iterable[str]) -> tuple[AdapterConfig, list[Finding]]:
        """Match every pattern with every module, so that the other methods answer at once.

        Patterns that take too long are reported, and the config is returned without them.
        """
        names, kept, found = list(modules), self, []
        limit = f"patterns that match {len(names)} names within {TIME_LIMIT_S:g} s"
        matchers: tuple[tuple[str, Matcher[Any]], ...] = (
            ("rank_pattern", self._ranks),
            ("alpha_pattern", self._alphas),
            ("target_modules", self._targets),
        )
        for key, matcher in matchers:
            try:
                for name in names:
                    matcher.find(name)
            except PatternsTooSlow:
                found.append(bad_config(key, limit, "patterns that take longer"))
                kept = replace(kept, rank=None, rank_pattern={}, alpha_pattern={}, target_pattern="")
        return kept, found

    @cached_property
    def _ranks(self) -> Matcher[int]:
        return Matcher(self.rank_pattern)

    @cached_property
    def _alphas(self) -> Matcher[float]:
        return Matcher(self.alpha_pattern)

    @cached_property
    def _targets(self) -> Matcher[bool]:
        return Matcher({self.target_pattern: True} if self.target_pattern else {}, whole=True)


@dataclass(frozen=True)
class ParsedConfig:
    """A config and what is wrong with it; config is None where nothing can be made of it."""

    config: AdapterConfig | None
    findings: tuple[Finding, ...]


def parse_config(data: bytes) -> ParsedConfig:
    """Read a config; every violation is found, not only the first."""
    try:
        fields = parse(data)
    except JsonInvalid as error:
        return ParsedConfig(None, (bad_config("", "a JSON object", f"no valid JSON ({error})"),))
    if not isinstance(fields, dict):
        return ParsedConfig(None, (bad_config("", "a JSON object", shown(fields)),))
    findings = refusals(fields)
    if any(finding.code in {"E_MLX", "E_NOT_LORA"} for finding in findings):
        return ParsedConfig(None, tuple(findings))
    findings += bad_fields(fields)
    if any(finding.code == "E_BAD_CONFIG" for finding in findings):
        return ParsedConfig(None, tuple(findings))
    return ParsedConfig(_config(fields), (*findings, *unknown_fields(fields)))


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
        target_pattern=targets if isinstance(targets, str) and targets.lower() != ALL_LINEAR else "",
        modules_to_save=tuple(fields.get("modules_to_save") or ()),
        base_model_name=fields.get("base_model_name_or_path") or "",
        base_model_revision=fields.get("revision") or "",
        base_model_class=str(mapping.get("base_model_class") or "") if isinstance(mapping, dict) else "",
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
