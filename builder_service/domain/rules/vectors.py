"""Magnitudes of DoRA and biases: whether they go together with the config, with A and B, and with the base."""

from collections.abc import Mapping, Sequence
from typing import Final

from builder_service.domain.adapter_config import AdapterConfig
from builder_service.domain.config_fields import FILE
from builder_service.domain.grouping import Grouping
from builder_service.domain.pairs import DOWN, Lone, Pair, features_of
from builder_service.domain.rules.stacks import MERGE
from builder_service.domain.safetensors_header import Tensor
from builder_service.domain.tensor_names import LoraKey, Side
from loramux_shared.bases.config import ModelConfig

_CODES: Final[Mapping[Side, str]] = {
    "magnitude": "E_DORA",
    "lora_bias": "E_BIAS",
    "bias": "E_BIAS",
    "bare_bias": "E_BIAS",
}


def refuse_vectors(key: LoraKey, tensors: Mapping[Side, Tensor], report: Grouping) -> bool:
    """Report vectors beside A and B that PEFT does not have or would not load; say whether there are some."""
    wrong = [side for side in _CODES if side in tensors and (_of_experts(key) or side == "bare_bias")]
    for side in wrong:
        if _of_experts(key):
            what = "magnitudes" if side == "magnitude" else "biases"
            texts = f"no {what} of experts: PEFT has none", f"{what} of experts", MERGE
        else:
            texts = (
                "the bias of a module with lora_A under the name base_layer.bias",
                "bias, which PEFT would not load",
                "It is of an older release: rename it, if it was trained; else save the adapter without it.",
            )
        expected, found, fix = texts
        report.add(_CODES[side], key.place, cause=(side, expected), expected=expected, found=found, fix=fix)
    return bool(wrong)


def _of_experts(key: LoraKey) -> bool:
    return key.expert is not None or key.holds_all


def check_vectors(pair: Pair, config: AdapterConfig, report: Grouping) -> None:
    """Report vectors that are not those that the config says, or are of another length than B."""
    for code, field, tensor, enabled in (
        ("E_DORA", "use_dora", pair.magnitude, config.use_dora),
        ("E_BIAS", "lora_bias", pair.lora_bias, config.lora_bias),
    ):
        if enabled is not None and enabled is not (tensor is not None):
            name = "lora_magnitude_vector" if code == "E_DORA" else "lora_B.bias"
            report.add(
                code,
                pair.place,
                cause=(field, enabled),
                expected=f"{name} of every module, for {field} is true" if enabled else f"no {name}",
                found="none" if enabled else f"some, and {field} is not true: PEFT would not load them",
                fix=f"Correct {field} in {FILE}, or save the adapter again.",
            )
    for vector in pair.tensors[2:]:
        _check_length(pair.key, vector, pair.b.shape[0], report)


def check_lone(
    vectors: list[Lone],
    config: AdapterConfig,
    base: ModelConfig,
    target_modules: frozenset[str],
    report: Grouping,
) -> None:
    """Report vectors of modules without A and B that the base has no place for, or that PEFT would not load."""
    for lone in vectors:
        features, modules = features_of(lone.changed, base), lone.changed.modules
        if lone.is_scale and not _is_scale(lone, config, report, gated=features is not None):
            continue
        beyond = [each.name for each in modules if target_modules and each.name not in target_modules]
        if features is None:
            place = f"a module of a base of {len(base.layers)} layers"
            fix = "The adapter was trained on another base."
            report.add("E_MODULE", lone.key.place, expected=place, found="none", cause="bias", fix=fix)
        elif beyond:
            allowed = f"lora_target_modules {', '.join(sorted(target_modules))}"
            fix = f"Add {', '.join(beyond)} to lora_target_modules."
            report.add(
                "E_MODULE",
                lone.key.place,
                cause=(*beyond, "bias"),
                expected=allowed,
                found=f"a vector of {beyond[0]}",
                fix=fix,
            )
        elif not lone.is_scale and config.use_dora is not None and not config.left_out_by(lone.key.name):
            report.add(
                "E_PAIR",
                lone.key.place,
                cause="bias",
                expected="lora_A and lora_B, for target_modules has the module",
                found="a bias alone, which PEFT would not load",
                fix="The file was cut or merged: save the adapter again.",
            )
        else:
            out = sum(out for _, out in features)
            _check_length(lone.key, lone.vector, out, report, ((1, out), (out, 1)) if lone.is_scale else ())


def _is_scale(lone: Lone, config: AdapterConfig, report: Grouping, *, gated: bool) -> bool:
    """Return True for a scale of an output, or of down_proj's input in a gated MLP; report others."""
    key = lone.key
    if _of_experts(key) or (lone.scales_input and (key.path != DOWN or not gated)):
        report.add(
            "E_MODULE",
            key.place,
            cause=(key.leaf, "scale"),
            expected="scales of outputs, or of what down_proj of a dense, gated MLP reads",
            found=f"a scale of what {key.leaf} reads" if lone.scales_input else "a scale of an expert",
            fix=MERGE,
        )
    elif field := config.left_out_by(key.name):
        report_left_out(key.place, field, "scales", config, report)
    else:
        return True
    return False


def report_left_out(place: str, field: str, what: str, config: AdapterConfig, report: Grouping) -> None:
    """Report tensors of a module that a field of the config leaves out."""
    note = f": it is {config.default_note}" if field == "target_modules" and config.default_for else ""
    report.add(
        "E_TARGETS",
        place,
        cause=field,
        expected=f"modules that adapter_config.json adapts; its {field} leaves these out{note}",
        found=f"{what} of them, which PEFT would not load",
        fix=f"Correct {field}, if they were trained; else save the adapter without these tensors.",
    )


def _check_length(
    key: LoraKey, vector: Tensor, out: int, report: Grouping, shapes: Sequence[tuple[int, ...]] = ()
) -> None:
    if vector.shape not in (shapes or [(out,)]):
        report.add(
            "E_DIMS",
            key.place,
            cause=(key.leaf, vector.shape),
            expected=f"vectors of {key.leaf} of {out} elements",
            found=f"shape {list(vector.shape)}",
            fix="The adapter was trained on another base, or was merged from two.",
        )
