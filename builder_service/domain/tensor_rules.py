"""Keys, pairs and shapes of an adapter's tensors against the base: from a header alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from builder_service.domain.adapter_config import AdapterConfig
from builder_service.domain.grouping import Grouping
from builder_service.domain.safetensors_header import READABLE, Tensor, TensorFile
from builder_service.domain.tensor_names import LoraKey, parse_key
from shared.bundle.manifest import Row
from shared.bundle.modules import BY_HF, BaseDims, Module

_MERGE: Final = "Merge it into the base (merge_and_unload) and serve a full model."
_KEY_FIXES: Final = {
    "E_UNKNOWN_KEY": "Expected keys like base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight.",
    "E_PREFIX": "Only layers of the text decoder are served: train with exclude_modules for the others.",
    "E_MODULE": f"Served are {', '.join(BY_HF)}.",
    "E_EMBED": "Adapters share the base's embeddings and head: merge it, or train without them.",
    "E_MLX": "MLX stores A and B transposed, with an absolute scale: convert it to PEFT's form.",
}


@dataclass(frozen=True)
class Limits:
    """What a deployment asks of its adapters."""

    dims: BaseDims
    max_rank: int
    target_modules: frozenset[str]
    """TensorRT-LLM's names; empty: all."""


@dataclass(frozen=True)
class Pair:
    """A and B of one module of a layer."""

    key: LoraKey
    a: Tensor
    b: Tensor

    @property
    def place(self) -> str:
        """The pair in words."""
        return f"layer {self.key.layer} {self.key.module.hf}"


def pair_up(file: TensorFile, report: Grouping) -> list[Pair]:
    """Return the pairs of a file, by (layer, module id); every other tensor is reported."""
    sides: dict[tuple[int, int], list[tuple[LoraKey, Tensor]]] = defaultdict(list)
    infixes: dict[str, str] = {}
    for name, tensor in file.tensors.items():
        parsed = parse_key(name)
        if not isinstance(parsed, LoraKey):
            fix = _KEY_FIXES.get(parsed.code, _MERGE)
            shown = 10 if parsed.code == "E_UNKNOWN_KEY" else 3
            report.add(parsed.code, name, cause=parsed.cause, found=parsed.cause, fix=fix, shown=shown)
            continue
        if 0 in tensor.shape:
            report.add("E_EMPTY_WEIGHTS", name, expected="elements", found="none", fix=EMPTY_FIX)
        if tensor.dtype not in READABLE:
            fix = "Save the adapter in float32, float16 or bfloat16."
            report.add(
                "E_DTYPE", name, cause=tensor.dtype, expected="F32, F16 or BF16", found=tensor.dtype, fix=fix
            )
        infixes.setdefault(parsed.infix, name)
        sides[parsed.layer, parsed.module.id].append((parsed, tensor))
    if len(infixes) > 1:
        report.add(
            "E_ADAPTER_INFIX",
            ", ".join(sorted(infixes.values())),
            expected="one adapter",
            found=", ".join(sorted(name or "(no name)" for name in infixes)),
            fix="Save one adapter: save_pretrained(selected_adapters=[...]).",
        )
    pairs = [_pair(sides[place], report) for place in sorted(sides)]
    return [pair for pair in pairs if pair is not None]


EMPTY_FIX: Final = (
    "This is what DeepSpeed ZeRO-3 saves without gathering: save again with "
    "stage3_gather_16bit_weights_on_model_save, or from the consolidated state dict."
)


def check_pairs(pairs: list[Pair], config: AdapterConfig, limits: Limits, report: Grouping) -> None:
    """Report every pair that does not fit itself, the config, the base or the deployment."""
    for pair in pairs:
        if 0 in pair.a.shape or 0 in pair.b.shape:
            continue  # reported as E_EMPTY_WEIGHTS
        if len(pair.a.shape) != 2 or len(pair.b.shape) != 2 or pair.a.shape[0] != pair.b.shape[1]:
            report.add(
                "E_RANK_SHAPE",
                pair.place,
                cause=(pair.key.module.hf, pair.a.shape, pair.b.shape),
                expected="lora_A (rank, in) and lora_B (out, rank)",
                found=f"lora_A {pair.a.shape} and lora_B {pair.b.shape}",
                fix="A and B are of different adapters: save the adapter again.",
            )
            continue
        _check_rank(pair, config, limits, report)
        _check_place(pair, limits, report)


def plan(pairs: list[Pair], config: AdapterConfig) -> list[Row]:
    """Return the rows of pairs without findings, in their order."""
    rows = []
    for pair in pairs:
        rank, features = pair.a.shape
        rows.append(
            Row(
                layer=pair.key.layer,
                module_id=pair.key.module.id,
                module=pair.key.module.name,
                rank=rank,
                in_features=features,
                out_features=pair.b.shape[0],
                scale=float(np.float32(config.scale_of(pair.key.name, rank))),
            )
        )
    return rows


def _pair(entries: list[tuple[LoraKey, Tensor]], report: Grouping) -> Pair | None:
    by_side: dict[Literal["A", "B"], list[tuple[LoraKey, Tensor]]] = {"A": [], "B": []}
    for key, tensor in entries:
        by_side[key.side].append((key, tensor))
    first = entries[0][0]
    place = f"layer {first.layer} {first.module.hf}"
    for side, found in by_side.items():
        if len(found) != 1:
            report.add(
                "E_PAIR",
                place,
                cause=(first.module.hf, side, len(found)),
                expected=f"one lora_{side}",
                found=str(len(found)),
                fix="The file was cut or merged: save the adapter again.",
            )
    if any(len(found) != 1 for found in by_side.values()):
        return None
    return Pair(first, by_side["A"][0][1], by_side["B"][0][1])


def _check_rank(pair: Pair, config: AdapterConfig, limits: Limits, report: Grouping) -> None:
    rank = pair.a.shape[0]
    said = config.rank_of(pair.key.name)
    if said is not None and said != rank:
        report.add(
            "E_RANK_SHAPE",
            pair.place,
            cause=("config", said, rank),
            expected=f"rank {said}, as adapter_config.json says",
            found=f"rank {rank} in the tensors",
            fix="Correct r or rank_pattern in adapter_config.json.",
        )
    if rank > limits.max_rank:
        report.add(
            "E_RANK_MAX",
            pair.place,
            cause=rank,
            expected=f"rank <= max_lora_rank {limits.max_rank}",
            found=f"rank {rank}",
            fix=f"Set max_lora_rank to at least {rank}.",
        )


def _check_place(pair: Pair, limits: Limits, report: Grouping) -> None:
    module: Module = pair.key.module
    if pair.key.layer >= limits.dims.num_layers:
        report.add(
            "E_LAYER",
            pair.place,
            expected=f"layers 0 to {limits.dims.num_layers - 1}",
            found=f"layer {pair.key.layer}",
            fix="The adapter is for a deeper base.",
        )
    if limits.target_modules and module.name not in limits.target_modules:
        report.add(
            "E_MODULE",
            pair.place,
            cause=("ceiling", module.name),
            expected=f"lora_target_modules {', '.join(sorted(limits.target_modules))}",
            found=module.name,
            fix=f"Add {module.name} to lora_target_modules.",
        )
    found = (pair.a.shape[1], pair.b.shape[0])
    expected = limits.dims.features(module)
    if found != expected:
        report.add(
            "E_DIMS",
            pair.place,
            cause=(module.hf, found),
            expected=f"{module.hf} in={expected[0]} out={expected[1]}",
            found=f"in={found[0]} out={found[1]}",
            fix="The adapter was trained on another base.",
        )
