"""Requests of a config that cannot be served as LoRA beside a shared base; each is refused by name."""

import re
from typing import Any, Final

from builder_service.domain.kinds import kind_of, load_kinds
from builder_service.domain.peft_kinds.lora import LORA
from loramux_shared.bundle.manifest import MAX_INVOCATION
from loramux_shared.faults import Finding
from loramux_shared.untrusted_json import excerpt, quoted

_MERGE: Final = "Merge it into the base (merge_and_unload) and serve a full model."
_CONVERT: Final = "PEFT's save_as_lora approximates some kinds by a LoRA."
CONVERTED: Final = (
    "Its initialisation changed the base: save it again with path_initial_model_for_weight_conversion."
)
RECKONED: Final = ("pissa", "olora")
"""Initialisations that changed the base by what follows from it."""
ON_BASE_OK: Final = frozenset({"gaussian", "orthogonal", "eva", "mica", "true", "false"})
"""Initialisations that left the base as it was."""
# Fields that can change the arithmetic of LoRA, and have no meaning for another kind.
_OF_LORA: Final = (
    "alora_invocation_tokens",
    "bias",
    "layer_replication",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
)
_UNSET: Final[tuple[Any, ...]] = (None, False, "none", [], {})
_BIASES: Final = ("none", "all", "lora_only")
CLASSIFIES: Final = "SEQ_CLS"
TAGS: Final = "TOKEN_CLS"
ENCODES: Final = "FEATURE_EXTRACTION"
_TASKS: Final = frozenset({"CAUSAL_LM", CLASSIFIES, TAGS, ENCODES, ""})
# Variants whose factors are not plain A and B. VeLoRA and runtime_config change training only.
_VARIANTS: Final = (
    "arrow_config",
    "bdlora_config",
    "kasa_config",
    "monteclora_config",
    "qalora_config",
    "use_bdlora",
    "use_qalora",
)
_EXPERTS: Final = re.compile(r"(?:.*\.)?(?:gate_up_proj|down_proj)")
MAX_NAME: Final = 512
"""Characters."""
INVOCATION: Final = "alora_invocation_tokens"
_MLX_KEYS: Final = ("fine_tune_type", "lora_parameters")


def refusals(fields: dict[str, Any]) -> list[Finding]:
    """Return one finding for each thing that a config asks for and that is refused."""
    if mlx := [key for key in _MLX_KEYS if key in fields]:
        return [_refused("E_MLX", mlx[0], "a PEFT adapter", "an MLX adapter", MLX_FIX)]
    kind = kind_of(fields)
    if kind is None:
        fix = f"Only what amounts to LoRA can be served beside a base. {_CONVERT} {_MERGE}"
        peft_type = quoted(fields.get("peft_type"))
        return [_refused("E_NOT_LORA", "peft_type", f"one of {', '.join(load_kinds())}", peft_type, fix)]
    if own := kind.refusals(fields):
        return own
    if kind is not LORA and (set_too := [key for key in _OF_LORA if fields.get(key) not in _UNSET]):
        name = kind.peft_type
        fix, expected = f"No release of PEFT has it for {name}. {_MERGE}", f"unset beside {name}"
        return [_refused("E_VARIANT", set_too[0], expected, excerpt(fields[set_too[0]]), fix)]
    return [finding for rule in (_methods, _activated, _initialisation, _task) for finding in rule(fields)]


MLX_FIX: Final = (
    "MLX stores lora_a as (in, r) and lora_b as (r, out) with an absolute scale: transpose both, "
    "name them lora_A and lora_B, and set lora_alpha = scale * rank."
)


def _methods(fields: dict[str, Any]) -> list[Finding]:
    found = []
    if (bias := fields.get("bias") or "none") not in _BIASES:
        found.append(_refused("E_BIAS", "bias", "none, all or lora_only", excerpt(bias), _MERGE))
    if fields.get("lora_bias") is True and fields.get("use_dora") is True:
        fix = "PEFT does not have both: correct the one that was not trained."
        found.append(_refused("E_BIAS", "lora_bias", "false beside use_dora", "true", fix))
    if fields.get("target_parameters") and fields.get("use_dora") is True:
        fix = "PEFT has no magnitudes of parameters: train with target_modules alone. Or: " + _MERGE
        found.append(_refused("E_DORA", "use_dora", "false beside target_parameters", "true", fix))
    found += [
        _refused("E_VARIANT", key, "unset", excerpt(fields[key]), _MERGE)
        for key in _VARIANTS
        if fields.get(key)
    ]
    if layers := fields.get("layer_replication"):
        fix = "Its layers do not exist in the base. " + _MERGE
        found.append(_refused("E_REPLICATION", "layer_replication", "unset", excerpt(layers), fix))
    if (parameters := fields.get("target_parameters")) and not parameters_of_experts(parameters):
        found.append(_target_parameters(parameters))
    return found


def _activated(fields: dict[str, Any]) -> list[Finding]:
    """Tokens from which on it acts, and what acts before them or is not known to PEFT beside them."""
    tokens = fields.get(INVOCATION)
    if not tokens:
        return []
    listed = isinstance(tokens, list) and all(type(token) is int and token >= 0 for token in tokens)
    if not listed or len(tokens) > MAX_INVOCATION:
        expected = f"a list of at most {MAX_INVOCATION} ids of tokens"
        return [_refused("E_ALORA", INVOCATION, expected, quoted(tokens), "Correct the file.")]
    fix = f"Train without it, or without {INVOCATION}."
    beside = {key: fields.get(key) for key in ("use_dora", "target_parameters", "trainable_token_indices")}
    beside["bias"] = fields.get("bias") not in (None, "none") and fields["bias"]
    task = fields.get("task_type")
    beside["task_type"] = task in (CLASSIFIES, TAGS, ENCODES) and task
    initial = fields.get("init_lora_weights")
    beside["init_lora_weights"] = isinstance(initial, str) and initial.lower() not in ON_BASE_OK and initial
    return [
        _refused("E_ALORA", key, f"unset beside {INVOCATION}", excerpt(value), fix)
        for key, value in beside.items()
        if value
    ]


def parameters_of_experts(value: Any) -> tuple[str, ...]:
    """Return ``target_parameters`` where all are of experts, which rows can be made of; else none."""
    names = [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
    served = [name for name in names if len(name) <= MAX_NAME and _EXPERTS.fullmatch(name)]
    return tuple(served) if isinstance(value, list) and len(served) == len(value) else ()


def _target_parameters(parameters: Any) -> Finding:
    """Experts have parameters without a module; to name a projection's weight like that is a roundabout."""
    expected = "experts.gate_up_proj, experts.down_proj; of projections target_modules instead"
    names = [name for name in parameters if isinstance(name, str)] if isinstance(parameters, list) else []
    fix = _MERGE
    if names and not any("expert" in name or "router" in name or ".gate" in name for name in names):
        modules = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names})
        fix = f"Train with target_modules {excerpt(', '.join(modules))} instead. Or: {_MERGE}"
    return _refused("E_TARGET_PARAMS", "target_parameters", expected, excerpt(parameters), fix)


def _initialisation(fields: dict[str, Any]) -> list[Finding]:
    value = fields.get("init_lora_weights", True)
    name = ("true" if value else "false") if isinstance(value, bool) or value is None else str(value).lower()
    if name in ON_BASE_OK or name in RECKONED:
        return []
    expected = f"one of {', '.join((*sorted(ON_BASE_OK), *RECKONED))}"
    return [_refused("E_INIT", "init_lora_weights", expected, excerpt(value), CONVERTED)]


def _task(fields: dict[str, Any]) -> list[Finding]:
    value = fields.get("task_type")
    if value is None or (isinstance(value, str) and value in _TASKS):
        return []
    fix = "It was trained for another task: it makes no text, no scores and no vectors of texts."
    return [
        _refused("E_TASK", "task_type", f"CAUSAL_LM, {CLASSIFIES}, {TAGS} or {ENCODES}", excerpt(value), fix)
    ]


def _refused(code: str, key: str, expected: str, found: str, fix: str) -> Finding:
    return Finding(code=code, where=f"adapter_config.json: {key}", expected=expected, found=found, fix=fix)
