"""The fields of a config that must have a certain form, those that are known at all, and patterns of names.

Untrusted patterns run in a process that bounds itself. PEFT uses `re`, and so does that process: the meaning is
the same. A pattern of fifteen characters keeps `re` busy for years with the interpreter's lock held, and others
want all memory, so neither happens here.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from builder_service.domain import peft_names
from builder_service.domain.sandbox import Bounds, ask
from loramux_shared.faults import Finding
from loramux_shared.untrusted_json import excerpt, quoted
from loramux_shared.wording import listed

MAX_PATTERN_CHARACTERS: Final = 4096
"""Longest pattern."""
MAX_PATTERNS: Final = 8192
"""Patterns of one field; EVA writes one per module, which is 560 for 80 layers."""
BOUNDS: Final = Bounds(cpu_s=1.0, memory_bytes=256 << 20)
"""For all names and all patterns of a config; honest ones take milliseconds, EVA's of 126 layers 0.2 s."""
_PLAIN: Final = re.compile(r"[A-Za-z0-9_.]*")
_MAX_PLAIN_MATCHES: Final = 20_000
"""Names times patterns that are matched here, where all patterns are plain: 20 ms."""
_FIELDS: Final = ("exclude_modules", "layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern")


class PatternsInvalid(Exception):
    """Patterns that PEFT could not compile: (field, pattern, problem) of each."""

    def __init__(self, problems: Sequence[Sequence[str]]) -> None:
        super().__init__(problems)
        self.problems = problems


@dataclass(frozen=True)
class ModuleReading:
    """The meaning of a config for one module of the base."""

    rank_patterns: tuple[int, ...]
    """Positions of those that match it; PEFT takes the first."""
    alpha_patterns: tuple[int, ...]
    left_out: str
    """The field of the config for which PEFT does not adapt it; empty: it does."""


def read_names(
    names: Sequence[str], fields: Mapping[str, Any], bounds: Bounds = BOUNDS
) -> dict[str, ModuleReading]:
    """Return what the fields of a config say about names of modules.

    Raises:
        PatternsInvalid: some are no patterns.
        TooCostly: all together need more than the bounds.
        ResourcesExhausted: this machine has no process for them.
    """
    question = dict(fields) | {"names": list(names)}
    patterns = list(_patterns(question))
    plain = len(patterns) * len(names) <= _MAX_PLAIN_MATCHES and all(map(_PLAIN.fullmatch, patterns))
    found = peft_names.answer(question) if plain else ask(peft_names, question, bounds)
    if problems := found.get("problems"):
        raise PatternsInvalid(problems)
    rows = zip(found["rank_pattern"], found["alpha_pattern"], found["left_out"], strict=True)
    return {
        name: ModuleReading(tuple(ranks), tuple(alphas), left_out)
        for name, (ranks, alphas, left_out) in zip(names, rows, strict=True)
    }


def _patterns(question: Mapping[str, Any]) -> Iterator[str]:
    for field in _FIELDS:
        value = question[field] or ()
        yield from [value] if isinstance(value, str) else value if field != "exclude_modules" else ()
    if isinstance(question["target_modules"], str):
        yield question["target_modules"]


FILE: Final = "adapter_config.json"
MAX_RANK: Final = 1 << 16
RANK: Final = f"a whole number from 1 to {MAX_RANK}"
MAX_NAME_CHARACTERS: Final = 4096
"""Longest name of a base."""
MAX_ALPHA: Final = 1e30
ALPHA: Final = f"a number above -{MAX_ALPHA:g} and below {MAX_ALPHA:g}"
MAX_SAVED_MODULES: Final = 64
"""Modules that are saved whole: embeddings, a head, norms."""
MAX_TOKENS: Final = 1 << 16
"""Most tokens whose rows are trained by themselves."""
PATTERNED: Final = (
    "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "modules_to_save", "layers_pattern",
)  # fmt: skip
"""Fields in which PEFT reads regular expressions."""
_IGNORED: Final = frozenset({
    "auto_mapping", "corda_config", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size",
    "runtime_config", "velora_config",
    "enable_lora", "merge_weights",  # of older releases
})  # fmt: skip
"""They say how it was trained."""
_USED: Final = frozenset({
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "base_model_name_or_path", "bdlora_config",
    "bias", "ensure_weight_tying", "exclude_modules", "init_lora_weights", "kasa_config", "layer_replication",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias",
    "modules_to_save", "monteclora_config", "peft_type", "qalora_config", "r", "rank_pattern", "revision",
    "target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_bdlora", "use_dora",
    "use_qalora", "use_rslora",
})  # fmt: skip
KNOWN: Final = _IGNORED | _USED


def bad_fields(fields: dict[str, Any]) -> list[Finding]:
    """Return one finding for each value that cannot be meant."""
    found = []
    for key, check, expected in (
        ("r", is_rank, RANK),
        ("lora_alpha", is_alpha, ALPHA),
        ("use_rslora", lambda value: isinstance(value, bool), "true or false"),
        ("use_dora", lambda value: isinstance(value, bool), "true or false"),
        ("lora_bias", lambda value: isinstance(value, bool), "true or false"),
        ("target_modules", _is_names_or_pattern, "a list of names or a pattern"),
        ("exclude_modules", _is_names_or_pattern, "a list of names or a pattern"),
        ("modules_to_save", _is_few_names, f"a list of at most {MAX_SAVED_MODULES} different names"),
        ("trainable_token_indices", _is_tokens, "a list of token ids, or one for each of some modules"),
        ("layers_to_transform", _is_layers, "a layer or a list of layers"),
        ("layers_pattern", _is_names_or_pattern, "a pattern or a list of patterns"),
        ("base_model_name_or_path", _is_name, f"a name of at most {MAX_NAME_CHARACTERS} characters"),
        ("revision", _is_name, f"a name of at most {MAX_NAME_CHARACTERS} characters"),
    ):
        value = fields.get(key)
        if value is not None and not check(value):
            found.append(bad_config(key, expected, quoted(value)))
        elif isinstance(value, str) and key in PATTERNED:
            found += _bad_sizes(key, [value])
        elif value and key in {"modules_to_save", "layers_pattern"}:
            found += _bad_sizes(key, value)
    found += _bad_patterns(fields, "rank_pattern", is_rank, RANK)
    found += _bad_patterns(fields, "alpha_pattern", is_alpha, ALPHA)
    return found + _contradictions(fields)


def unknown_fields(fields: dict[str, Any]) -> list[Finding]:
    """Return a warning about fields that this version does not know and that are set to something."""
    unknown = sorted(key for key, value in fields.items() if key not in KNOWN and value not in (None, False))
    if not unknown:
        return []
    fix = "PEFT drops what it does not know. Make sure that they do not change what the adapter computes."
    found = listed([*map(excerpt, unknown)], 5)
    return [Finding(code="W_UNKNOWN_FIELD", where=FILE, expected="fields of PEFT", found=found, fix=fix)]


def bad_config(where: str, expected: str, found: str) -> Finding:
    """Return the finding about a value of the config."""
    place = ": ".join(part for part in (FILE, where) if part)
    return Finding(code="E_BAD_CONFIG", where=place, expected=expected, found=found, fix="Correct the file.")


def is_rank(value: Any) -> bool:
    """Return True for what a rank can be."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_RANK


def is_alpha(value: Any) -> bool:
    """Return True if a value can be an alpha: PEFT writes fractions, and reads negative alphas as they are."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_ALPHA < value < MAX_ALPHA


def _bad_patterns(
    fields: dict[str, Any], key: str, check: Callable[[Any], bool], expected: str
) -> list[Finding]:
    patterns = fields.get(key) or {}
    if not isinstance(patterns, dict):
        return [bad_config(key, "an object", quoted(patterns))]
    found = _bad_sizes(key, patterns)
    for pattern, value in patterns.items():
        if not check(value):
            found.append(bad_config(f"{key}.{excerpt(pattern)}", expected, quoted(value)))
    return found


def _bad_sizes(key: str, patterns: Collection[str]) -> list[Finding]:
    if len(patterns) > MAX_PATTERNS:
        return [bad_config(key, f"at most {MAX_PATTERNS} patterns", str(len(patterns)))]
    longest = max(map(len, patterns), default=0)
    if longest > MAX_PATTERN_CHARACTERS:
        return [
            bad_config(key, f"patterns of at most {MAX_PATTERN_CHARACTERS} characters", f"one of {longest}")
        ]
    return []


def _contradictions(fields: dict[str, Any]) -> list[Finding]:
    """Return findings about fields that PEFT does not accept together."""
    found = []
    if isinstance(fields.get("target_modules"), str):
        found += [
            bad_config(key, "unset where target_modules is a pattern", quoted(fields[key]))
            for key in ("layers_to_transform", "layers_pattern")
            if fields.get(key) not in (None, [])
        ]
    elif fields.get("layers_pattern") and fields.get("layers_to_transform") is None:
        found.append(
            bad_config("layers_pattern", "layers_to_transform beside it", quoted(fields["layers_pattern"]))
        )
    return found


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME_CHARACTERS


def _is_few_names(value: Any) -> bool:
    return _is_names(value) and len(set(value)) <= MAX_SAVED_MODULES


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_names_or_pattern(value: Any) -> bool:
    return isinstance(value, str) or _is_names(value)


def _is_tokens(value: Any) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return len(lists) <= MAX_SAVED_MODULES and all(
        isinstance(each, list) and len(each) <= MAX_TOKENS and all(type(index) is int for index in each)
        for each in lists
    )


def _is_layers(value: Any) -> bool:
    return all(type(item) is int for item in (value if isinstance(value, list) else [value]))
