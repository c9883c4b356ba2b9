"""``adapter_config.json`` as PEFT means it: what is honoured, what is refused by name, which scale results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from builder_service.domain.config_fields import (
    BOUNDS,
    PATTERNED,
    ModuleReading,
    PatternsInvalid,
    bad_config,
    bad_fields,
    read_names,
    unknown_fields,
)
from builder_service.domain.kinds import as_lora, kind_of
from builder_service.domain.peft_kinds.kind import PeftKind
from builder_service.domain.peft_kinds.lora import LORA
from builder_service.domain.rules.config import (
    CLASSIFIES,
    ENCODES,
    INVOCATION,
    RECKONED,
    TAGS,
    parameters_of_experts,
    refusals,
)
from builder_service.domain.sandbox import TooCostly
from loramux_shared.faults import Finding
from loramux_shared.untrusted_json import JsonInvalid, excerpt, parse_strict_json

DEFAULT_ALPHA: Final = 8.0
"""PEFT's own."""


@dataclass(frozen=True)
class AdapterConfig:
    """The fields that serving needs."""

    kind: PeftKind = field(default=LORA, kw_only=True)
    rank: int | None
    """None: not given. PEFT's default is 8, but the tensors are the truth."""
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    initial: str = ""
    """The initialisation that took a part of the base's weights, which follows from them; else empty."""
    target_modules: tuple[str, ...] | str | None = None
    """Names, a pattern or ``all-linear``; None where there is no config, which could say it."""
    default_for: str = ""
    """The ``model_type`` for which PEFT chose the target modules, where the config does not say them."""
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] | int = ()
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    """Parameters of experts, by ends of their names."""
    invocation_tokens: tuple[int, ...] = ()
    """Tokens from which on the adapter acts; none: it acts on everything."""
    trainable_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """``trainable_token_indices``, by ends of names of modules."""
    ensure_weight_tying: bool = False
    classifies: bool = False
    """True if the adapter was trained to classify texts or their tokens, with a score head."""
    of_tokens: bool = False
    """True if it was their tokens."""
    encodes: bool = False
    """True if the adapter was trained to make vectors of texts."""
    use_dora: bool | None = False
    """True if every module has magnitudes; None where the config does not say."""
    lora_bias: bool | None = False
    """True if every lora_B has a bias; None where the config does not say."""
    normalised: bool = False
    """True if magnitudes are divided by the norms of their rows already."""
    base_model_name: str = ""
    base_model_revision: str = ""
    base_model_class: str = ""
    readings: Mapping[str, ModuleReading] = field(default_factory=dict)
    """Readings of modules of the base, by name; see `read`."""

    def ranks_of(self, module: str) -> tuple[int, ...]:
        """Return the ranks that a module of the base may have; none where the config does not say.

        They are several where several patterns match: PEFT takes the first, but sorts the patterns when it
        saves them, so the file does not tell which was the first when the adapter was trained.
        """
        found = tuple(self._ranks[at] for at in self._reading(module).rank_patterns)
        return found or (() if self.rank is None else (self.rank,))

    def alphas_of(self, module: str) -> tuple[float, ...]:
        """Return the alphas that a module of the base may have, for the same reason; PEFT loads the first."""
        return tuple(self._alphas[at] for at in self._reading(module).alpha_patterns) or (self.alpha,)

    def scale_of(self, module: str, rank: int) -> float:
        """Return alpha/r, or alpha/sqrt(r) with rsLoRA, with the module's own alpha and its own rank.

        The rank is that of the training; 0 where the tensors do not show it. The scale is 1 where the config
        does not say the rank either, which only one that is refused does.
        """
        known = rank or next(iter(self.ranks_of(module)), 0)
        return self.kind.scale(self.alphas_of(module)[0], known, self.rank, self.use_rslora) if known else 1.0

    def indices_of(self, module: str) -> tuple[int, ...]:
        """Return the tokens that rows of a module of the base are trained of, in the order of the rows."""
        found = (indices for name, indices in self.trainable_tokens.items() if is_end(name, module))
        return next(found, ())

    def left_out_by(self, module: str) -> str:
        """Return the field for which PEFT does not adapt a module of the base; empty where it does."""
        return self._reading(module).left_out

    def with_default_targets(self, model_type: str) -> tuple[AdapterConfig, list[Finding]]:
        """Return the config with what PEFT adapts of a base where the config says no ``target_modules``."""
        if self.target_modules is not None:
            return self, []
        targets = self.kind.targets.get(model_type)
        if targets is None and not self.target_parameters:
            expected = f"names or a pattern: PEFT has no default for {model_type}"
            return self, [bad_config("target_modules", expected, "none")]
        return replace(self, target_modules=targets or (), default_for=model_type), []

    @property
    def default_note(self) -> str:
        """Return PEFT's default target modules, where the config names none; else an empty text."""
        targets = self.target_modules or "none"
        shown_targets = targets if isinstance(targets, str) else ", ".join(targets)
        return (
            f"not given, which means {shown_targets} to PEFT for {self.default_for}" if self.default_for else ""
        )

    def read(self, modules: Iterable[str]) -> tuple[AdapterConfig, list[Finding]]:
        """Read every pattern for every module, which is what the other methods answer from.

        Patterns that cannot be read are reported, and the config is returned without them.
        """
        names, fields = list(dict.fromkeys(modules)), self._choosing()
        try:
            return replace(self, readings=read_names(names, fields)), []
        except PatternsInvalid as error:
            found = [
                bad_config(name, "a regular expression", f"{excerpt(pattern)} ({problem})")
                for name, pattern, problem in error.problems
            ]
        except TooCostly as error:
            patterned = [name for name in PATTERNED if fields[name]]
            limit = f"patterns that match {len(names)} names within {BOUNDS}"
            found = [bad_config(", ".join(patterned), limit, f"patterns that take {error}")]
        plain = replace(self, rank=None, rank_pattern={}, alpha_pattern={}, target_modules=None)
        return replace(plain, exclude_modules=(), layers_to_transform=(), modules_to_save=()), found

    def _choosing(self) -> dict[str, Any]:
        """Return the fields that speak about names, as the file has them."""
        targets, excluded = self.target_modules, self.exclude_modules
        layers = self.layers_to_transform
        return {
            "rank_pattern": list(self.rank_pattern),
            "alpha_pattern": list(self.alpha_pattern),
            "target_modules": list(targets) if isinstance(targets, tuple) else targets,
            "exclude_modules": excluded if isinstance(excluded, str) else list(excluded),
            "modules_to_save": list(self.modules_to_save),
            "layers_to_transform": layers if isinstance(layers, int) else list(layers),
            "layers_pattern": list(self.layers_pattern),
        }

    @cached_property
    def _ranks(self) -> tuple[int, ...]:
        return tuple(self.rank_pattern.values())

    @cached_property
    def _alphas(self) -> tuple[float, ...]:
        return tuple(self.alpha_pattern.values())

    def _reading(self, module: str) -> ModuleReading:
        return self.readings.get(module, UNMENTIONED)


UNMENTIONED: Final = ModuleReading((), (), "")


@dataclass(frozen=True)
class ParsedConfig:
    """A config and what is wrong with it; config is None where nothing can be made of it."""

    config: AdapterConfig | None
    findings: tuple[Finding, ...]
    kind: PeftKind = LORA


def parse_config(data: bytes) -> ParsedConfig:
    """Read a config; every violation is found, not only the first."""
    try:
        fields = parse_strict_json(data)
    except JsonInvalid as error:
        return ParsedConfig(None, (bad_config("", "a JSON object", f"invalid JSON ({error})"),))
    if not isinstance(fields, dict):
        return ParsedConfig(None, (bad_config("", "a JSON object", excerpt(fields)),))
    kind = kind_of(fields) or LORA
    findings = refusals(fields)
    fields = as_lora(kind, fields)
    if any(finding.code in {"E_MLX", "E_NOT_LORA"} for finding in findings):
        return ParsedConfig(None, tuple(findings))
    findings += bad_fields(fields)
    if any(finding.code == "E_BAD_CONFIG" for finding in findings):
        return ParsedConfig(None, tuple(findings), kind)
    return ParsedConfig(_config(kind, fields), (*findings, *unknown_fields(fields)))


def _config(kind: PeftKind, fields: dict[str, Any]) -> AdapterConfig:
    targets, excluded = fields.get("target_modules"), fields.get("exclude_modules")
    layers, alpha = fields.get("layers_to_transform"), fields.get("lora_alpha")
    return AdapterConfig(
        kind=kind,
        rank=fields.get("r"),
        alpha=float(DEFAULT_ALPHA if alpha is None else alpha),
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
        initial=_initial(fields.get("init_lora_weights")),
        use_rslora=bool(fields.get("use_rslora")),
        classifies=fields.get("task_type") in (CLASSIFIES, TAGS),
        of_tokens=fields.get("task_type") == TAGS,
        encodes=fields.get("task_type") == ENCODES,
        use_dora=_lora_flag(kind, fields.get("use_dora")),
        lora_bias=_lora_flag(kind, fields.get("lora_bias")),
        target_modules=tuple(targets) if isinstance(targets, list) else targets,
        exclude_modules=excluded if isinstance(excluded, str) else tuple(excluded or ()),
        layers_to_transform=layers if isinstance(layers, int) else tuple(layers or ()),
        layers_pattern=_patterns(fields.get("layers_pattern")),
        modules_to_save=tuple(dict.fromkeys(fields.get("modules_to_save") or ())),
        target_parameters=parameters_of_experts(fields.get("target_parameters")),
        invocation_tokens=_tokens(fields.get(INVOCATION)),
        trainable_tokens=_trainable_tokens(fields.get("trainable_token_indices") or {}),
        ensure_weight_tying=fields.get("ensure_weight_tying") is True,
        base_model_name=fields.get("base_model_name_or_path") or "",
        base_model_revision=fields.get("revision") or "",
        base_model_class=_base_class(fields.get("auto_mapping")),
    )


def _initial(value: Any) -> str:
    """Return the initialisation that took a part of the base's weights; empty for others."""
    name = str(value).lower()
    return name if name in RECKONED else ""


def _lora_flag(kind: PeftKind, value: Any) -> bool | None:
    """Return a switch that only LoRA has; None for other kinds, whose tensors say it."""
    return bool(value) if kind is LORA else None


def _patterns(value: str | list[str] | None) -> tuple[str, ...]:
    """Return one pattern, or several, as a tuple."""
    return (value,) if value and isinstance(value, str) else tuple(value or ())


def _base_class(mapping: Any) -> str:
    """Return the class of the base in ``auto_mapping``; empty where it has none."""
    return str(mapping.get("base_model_class") or "") if isinstance(mapping, dict) else ""


def _tokens(value: Any) -> tuple[int, ...]:
    """Return the ids of a list; anything else was refused before."""
    return tuple(token for token in value if type(token) is int) if isinstance(value, list) else ()


def _trainable_tokens(value: dict[str, list[int]] | list[int]) -> dict[str, tuple[int, ...]]:
    named = value if isinstance(value, dict) else {"embed_tokens": value}
    return {name: tuple(indices) for name, indices in named.items()}


def is_end(end: str, name: str) -> bool:
    """Return True where a name of the config means a module of the base."""
    return f".{name}".endswith(f".{end}")
