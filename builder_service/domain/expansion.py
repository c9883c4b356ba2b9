"""Tensors of other kinds as the A and B that they amount to: products, which round once in float32."""

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Final

from builder_service.domain.derived import Derived, Product
from builder_service.domain.grouping import Grouping
from builder_service.domain.kinds import load_kinds
from builder_service.domain.pairs import features_of
from builder_service.domain.peft_kinds.kind import Features, Parts, PeftKind, Sides
from builder_service.domain.safetensors_header import READABLE, Tensor, TensorFile
from builder_service.domain.tensor_names import LoraKey, parse_key
from loramux_shared.bases.config import ModelConfig

MAX_RANK: Final = 1024
"""Largest rank that is made, whatever a deployment allows: a small file could ask for terabytes."""
SAVE: Final = "Save the adapter again with PEFT, under the kind that its config says."


@dataclass(frozen=True)
class Expanded:
    """A file in the words of LoRA."""

    file: TensorFile
    idle: tuple[str, ...] = ()
    """Tensors without elements: of modules that AdaLoRA left no rank."""


def expand_tensors(file: TensorFile, kind: PeftKind, base: ModelConfig, report: Grouping) -> Expanded:
    """Return a file that has A and B for each module, of any kind; report what does not fit together."""
    how = kind.pairs
    key = re.compile(rf"(.+)\.({'|'.join(sorted(how.parts, reverse=True))})((?:\.[^.]+)?)")
    shared_key = re.compile(rf"base_model\.({'|'.join(how.shared)})(?:\.[^.]+)?")
    modules: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    shared: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        if how.parts and (match := key.fullmatch(name)):
            modules[match[1], match[3]][match[2]] = tensor
        elif how.shared and (match := shared_key.fullmatch(name)):
            shared[match[1]] = tensor
        elif not is_foreign(name, kind, report):
            tensors[name] = tensor
    recipes: dict[str, Product] = {}
    idle: list[str] = []
    for (module, infix), parts in modules.items():
        if how.may_be_empty and parts.keys() == set(how.parts) and _has_no_rank(parts):
            idle += [part.name for part in parts.values()]
        elif sides := _sides(module, kind, {**shared, **parts}, _features(module, base), report):
            trained = how.trained_rank(parts)
            for letter, side in zip("AB", sides, strict=True):
                name = f"{module}.lora_{letter}{infix}.weight"
                size = 4 * side.shape[0] * side.shape[1]
                tensors[name] = Tensor(name, "F32", side.shape, 0, size, trained)
                recipes[name] = side.product
    return Expanded(Derived(file.path, tensors, file, recipes), tuple(sorted(idle)))


def is_foreign(name: str, kind: PeftKind, report: Grouping) -> bool:
    """Return True for the key of a tensor of another kind than the config says, and report it."""
    if not any(each.mark and each.mark in name and each is not kind for each in load_kinds().values()):
        return False
    found = f"keys of another kind than {kind.peft_type}"
    expected = f"keys of {kind.peft_type}"
    report.add("E_UNKNOWN_KEY", name, expected=expected, found=found, fix=SAVE, places_listed=10)
    return True


def _has_no_rank(parts: Parts) -> bool:
    return all(0 in tensor.shape for tensor in parts.values())


def _features(module: str, base: ModelConfig) -> Features:
    """Return the inputs and the outputs of a module; 0 where the base has no such module."""
    key = parse_key(
        f"{module}.lora_A.weight",
        base.dims.fused,
        base.renamed,
        base.layer_names,
        experts=base.has_experts,
    )
    found = features_of(key, base) if isinstance(key, LoraKey) and not key.holds_all else None
    return (found[0][0], sum(out for _, out in found)) if found else (0, 0)


def _sides(module: str, kind: PeftKind, parts: Parts, features: Features, report: Grouping) -> Sides | None:
    """Return A and B of a module with these features, or report why there are none."""
    missing = _missing_parts(kind, parts)
    if missing:
        fix = "The file was cut or merged: save the adapter again."
        report.add(
            "E_PAIR", module, cause=missing, expected=f"{missing} beside the others", found="none", fix=fix
        )
        return None
    odd = sorted({tensor.dtype for tensor in parts.values()} - READABLE.keys())
    if odd:
        fix = "Save the adapter in float32, float16 or bfloat16."
        report.add("E_DTYPE", module, cause=odd[0], expected="F32, F16 or BF16", found=odd[0], fix=fix)
        return None
    shapes = {name: tensor.shape for name, tensor in parts.items()}
    sides = kind.pairs.make(parts, features) if all(0 not in shape for shape in shapes.values()) else None
    if sides is None:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        report.add(
            "E_RANK_SHAPE",
            module,
            cause=found,
            expected=f"the shapes of {kind.peft_type}",
            found=found[:300],
            fix=SAVE,
        )
    elif (rank := sides[0].shape[0]) > MAX_RANK:
        report.add(
            "E_RANK_MAX",
            module,
            cause=rank,
            expected=f"rank <= {MAX_RANK} of what {kind.peft_type} amounts to as LoRA",
            found=f"rank {rank}",
            fix="Merge it into the base (merge_and_unload) and serve a full model.",
        )
        return None
    return sides


def _missing_parts(kind: PeftKind, parts: Parts) -> str:
    """Return a part without which there is no product; empty where there is one."""
    how = kind.pairs
    required = how.required(parts) if how.required else (*how.parts, *how.shared)
    return next((name for name in required if name not in parts), "")
