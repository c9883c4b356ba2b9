"""Pairs of parameters with a matrix of each expert: their owners, and whether they can be distinguished."""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from builder_service.domain.derived import Derived
from builder_service.domain.grouping import Grouping
from builder_service.domain.pairs import Pair
from builder_service.domain.safetensors_header import TensorFile
from builder_service.domain.stacked import View, parameters_of, unstack
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.layers import ExpertsLayer

MERGE: Final = "Merge it into the base (merge_and_unload) and serve a full model."


def unstacked(
    file: TensorFile, pairs: list[Pair], base: ModelConfig, parameters: tuple[str, ...], report: Grouping
) -> tuple[TensorFile, list[Pair]]:
    """Return pairs of single experts for those of all, and the file to read them from."""
    of_layers: dict[int, dict[str, Pair]] = defaultdict(dict)
    for pair in pairs:
        if pair.key.holds_all:
            of_layers[pair.key.layer][pair.key.path] = pair
    if parameters and not of_layers:
        report.add(
            "E_TARGET_PARAMS",
            "adapter_config.json: target_parameters",
            expected="tensors of experts that the base has; without experts, target_modules alone",
            found=f"{', '.join(parameters)}, but no such tensors",
            fix=MERGE,
        )
    found = [pair for pair in pairs if not pair.key.holds_all]
    tensors = dict(file.tensors)
    views: dict[str, View] = {}
    for layer, own in of_layers.items():
        spec = base.layers[layer].mlp if layer < len(base.layers) else None
        keys = parameters_of({path: pair.key for path, pair in own.items()}, parameters)
        for path, pair in own.items():
            if not isinstance(spec, ExpertsLayer):
                _refuse_layer(pair, base, report)
            elif keys is None:
                _refuse_parameters(pair, parameters, report)
            elif _is_stack(pair, spec.num, report):
                for key, a, b, seen in unstack(keys[path], pair.a, pair.b, spec, base):
                    found.append(Pair(key, a, b))
                    tensors |= {a.name: a, b.name: b}
                    views |= dict(zip((a.name, b.name), seen, strict=True))
    return (Derived(file.path, tensors, file, views) if views else file), found


def _refuse_layer(pair: Pair, base: ModelConfig, report: Grouping) -> None:
    within = pair.key.layer < len(base.layers)
    report.add(
        "E_MODULE" if within else "E_LAYER",
        pair.place,
        expected="a layer with experts",
        found="one without" if within else f"a base of {len(base.layers)} layers",
        fix="The adapter was trained on another base.",
    )


def _refuse_parameters(pair: Pair, parameters: tuple[str, ...], report: Grouping) -> None:
    report.add(
        "E_TARGET_PARAMS",
        pair.place,
        expected="tensors of those parameters of experts that target_parameters names, and of all of them",
        found=f"target_parameters {', '.join(parameters) or 'unset'}, and others in the tensors",
        fix="Correct target_parameters in adapter_config.json: it says which parameters these tensors are of.",
    )


def _is_stack(pair: Pair, num: int, report: Grouping) -> bool:
    """Return True if A has rows and B columns for so many experts; empty ones are reported elsewhere."""
    a, b = pair.a.shape, pair.b.shape
    if 0 in a or 0 in b:
        return False
    if len(a) == 2 and len(b) == 2 and a[0] == b[1] and a[0] % num == 0:
        return True
    report.add(
        "E_RANK_SHAPE",
        pair.place,
        cause=(pair.key.path, a, b),
        expected=f"lora_A ({num} experts * rank, in) and lora_B (out, rank * {num} experts)",
        found=f"lora_A {a} and lora_B {b}",
        fix="The adapter was trained on a base with another number of experts.",
    )
    return False
