"""Tensors of other kinds as the A and B that they amount to: products, which round once in float32.

With W the delta of a module, and s its scale:

- AdaLoRA: W = s B (E * A), E a singular value for each row of A.
- VeRA: W = (b * B) (d * A), of which A and B are those of all modules, cut to the module's size.
- LoHa: W = s (B1 A1) * (B2 A2), element by element. Its rank is at most r * r: rows of A are all products of a
  row of A1 and one of A2, columns of B likewise.
- LoKr: W = s kron(W1, W2), each of them whole or a product of two. kron(B1 A1, B2 A2) is
  kron(B1, B2) kron(A1, A2); what is whole is a product with the identity on its shorter side.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from builder_service.domain.derived import Derived, Product
from builder_service.domain.grouping import Grouping
from builder_service.domain.kinds import Kind
from builder_service.domain.safetensors_header import READABLE, Tensor, TensorFile
from builder_service.domain.tensor_names import LoraKey, parse_key
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bundle.npy import Array

MAX_RANK: Final = 1024
"""Largest rank that is made, whatever a deployment allows: a small file could ask for terabytes."""
_PARTS: Final[Mapping[Kind, tuple[str, ...]]] = {
    Kind.ADALORA: ("lora_A", "lora_B", "lora_E"),
    Kind.VERA: ("vera_lambda_b", "vera_lambda_d"),
    Kind.LOHA: ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    Kind.LOKR: ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
}
_SHARED: Final = re.compile(r"base_model\.(vera_[AB])(?:\.[^.]+)?")
"""VeRA's projections, which all modules have in common."""

_MARKS: Final = {".lora_": Kind.LORA, ".ia3_l": Kind.IA3}
SAVE: Final = "Save the adapter again with PEFT, under the kind that its config says."

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Expanded:
    """A file in the words of LoRA."""

    file: TensorFile
    idle: tuple[str, ...] = ()
    """Tensors without elements: of modules that AdaLoRA left no rank."""


@dataclass(frozen=True)
class Side:
    """A or B of a module."""

    shape: tuple[int, int]
    product: Product


def expand_tensors(file: TensorFile, kind: Kind, base: ModelConfig, report: Grouping) -> Expanded:
    """Return a file that has A and B for each module, of any kind; report what does not fit together."""
    key = re.compile(rf"(.+)\.({'|'.join(sorted(_PARTS.get(kind, ()), reverse=True))})((?:\.[^.]+)?)")
    modules: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    shared: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        if kind in _PARTS and (match := key.fullmatch(name)):
            modules[match[1], match[3]][match[2]] = tensor
        elif kind is Kind.VERA and (match := _SHARED.fullmatch(name)):
            shared[match[1]] = tensor
        elif not is_foreign(name, kind, report):
            tensors[name] = tensor
    recipes: dict[str, Product] = {}
    idle: list[str] = []
    for (module, infix), parts in modules.items():
        if kind is Kind.ADALORA and parts.keys() == set(_PARTS[kind]) and _has_no_rank(parts):
            idle += [part.name for part in parts.values()]
        elif sides := _sides(module, kind, {**shared, **parts}, _width(module, base), report):
            trained = _trained(kind, parts)
            for letter, side in zip("AB", sides, strict=True):
                name = f"{module}.lora_{letter}{infix}.weight"
                size = 4 * side.shape[0] * side.shape[1]
                tensors[name] = Tensor(name, "F32", side.shape, 0, size, trained)
                recipes[name] = side.product
    return Expanded(Derived(file.path, tensors, file, recipes), tuple(sorted(idle)))


def is_foreign(name: str, kind: Kind, report: Grouping) -> bool:
    """Return True for the key of a tensor of another kind than the config says, and report it."""
    if not any(mark in name and kind is not owner for mark, owner in _MARKS.items()):
        return False
    found = f"keys of another kind than {kind}"
    report.add("E_UNKNOWN_KEY", name, expected=f"keys of {kind}", found=found, fix=SAVE, places_listed=10)
    return True


def _has_no_rank(parts: Parts) -> bool:
    return all(0 in tensor.shape for tensor in parts.values())


def _trained(kind: Kind, parts: Parts) -> int | None:
    """Return the rank that the config speaks of; 0 where the tensors do not show it, None where it is A's."""
    if kind not in (Kind.LOHA, Kind.LOKR):
        return None
    names = ("hada_w1_b", "lokr_w1_b", "lokr_w2_b")
    return next((parts[name].shape[0] for name in names if name in parts), 0)


def _width(module: str, base: ModelConfig) -> int:
    """Return the elements of what a module reads; 0 where the base has no such module."""
    key = parse_key(
        f"{module}.lora_A.weight",
        base.dims.fused,
        base.renamed,
        base.layer_names,
        experts=base.has_experts,
    )
    features = base.features(key.modules[0].name, key.layer) if isinstance(key, LoraKey) else None
    return features[0] if features else 0


def _sides(module: str, kind: Kind, parts: Parts, width: int, report: Grouping) -> tuple[Side, Side] | None:
    """Return A and B of a module that reads so many elements, or report why there are none."""
    missing = _missing(kind, parts)
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
    sides = _MAKERS[kind](parts, width) if all(0 not in shape for shape in shapes.values()) else None
    if sides is None:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        report.add(
            "E_RANK_SHAPE", module, cause=found, expected=f"the shapes of {kind}", found=found[:300], fix=SAVE
        )
    elif (rank := sides[0].shape[0]) > MAX_RANK:
        report.add(
            "E_RANK_MAX",
            module,
            cause=rank,
            expected=f"rank <= {MAX_RANK} of what {kind} amounts to as LoRA",
            found=f"rank {rank}",
            fix="Merge it into the base (merge_and_unload) and serve a full model.",
        )
        return None
    return sides


def _missing(kind: Kind, parts: Parts) -> str:
    """Return a part without which there is no product; empty where there is one."""
    if kind is Kind.LOKR:
        required = [
            name
            for factor in ("lokr_w1", "lokr_w2")
            for name in ((factor,) if factor in parts else (f"{factor}_a", f"{factor}_b"))
        ]
    else:
        required = [*_PARTS[kind], *(("vera_A", "vera_B") if kind is Kind.VERA else ())]
    return next((name for name in required if name not in parts), "")


def _adalora(parts: Parts, _: int) -> tuple[Side, Side] | None:
    a, b, e = (parts[name] for name in _PARTS[Kind.ADALORA])
    if not (len(a.shape) == len(b.shape) == 2 and e.shape == (a.shape[0], 1) and b.shape[1] == a.shape[0]):
        return None
    return Side((a.shape[0], a.shape[1]), Product((a.name, e.name), lambda a, e: a * e)), _itself(b)


def _vera(parts: Parts, width: int) -> tuple[Side, Side] | None:
    a, b, out, inner = (parts[name] for name in ("vera_A", "vera_B", "vera_lambda_b", "vera_lambda_d"))
    fits = len(a.shape) == len(b.shape) == 2 and len(out.shape) == len(inner.shape) == 1
    if not fits or (a.shape[0], b.shape[1]) != inner.shape * 2 or b.shape[0] < out.shape[0]:
        return None
    if a.shape[1] < width:
        return None
    rows, columns = out.shape[0], width or a.shape[1]
    return (
        Side((a.shape[0], columns), Product((a.name, inner.name), lambda a, d: a[:, :columns] * d[:, None])),
        Side((rows, b.shape[1]), Product((b.name, out.name), lambda b, scale: b[:rows] * scale[:, None])),
    )


def _loha(parts: Parts, _: int) -> tuple[Side, Side] | None:
    b1, a1, b2, a2 = (parts[name] for name in _PARTS[Kind.LOHA])
    if not _are_products((b1, a1), (b2, a2)) or (b1.shape[0], a1.shape[1]) != (b2.shape[0], a2.shape[1]):
        return None
    rank, (out, inside) = a1.shape[0] * a2.shape[0], (b1.shape[0], a1.shape[1])
    return (
        Side(
            (rank, inside), Product((a1.name, a2.name), lambda x, y: (x[:, None] * y[None]).reshape(rank, -1))
        ),
        Side(
            (out, rank), Product((b1.name, b2.name), lambda x, y: (x[:, :, None] * y[:, None]).reshape(out, -1))
        ),
    )


def _lokr(parts: Parts, _: int) -> tuple[Side, Side] | None:
    factors = [_factor(parts, name) for name in ("lokr_w1", "lokr_w2")]
    if None in factors:
        return None
    (b1, a1), (b2, a2) = (factor for factor in factors if factor is not None)
    return _kron(a1, a2), _kron(b1, b2)


def _factor(parts: Parts, name: str) -> tuple[Side, Side] | None:
    """Return B and A of a factor."""
    whole = parts.get(name)
    if whole is None:
        b, a = parts[f"{name}_a"], parts[f"{name}_b"]
        if not _are_products((b, a)):
            return None
        return _itself(b), _itself(a)
    if len(whole.shape) != 2:
        return None
    out, inside = whole.shape
    itself, rank = _itself(whole), min(out, inside)
    one = Side((rank, rank), Product((), lambda: np.eye(rank, dtype=np.float32)))
    return (one, itself) if out <= inside else (itself, one)


def _kron(first: Side, second: Side) -> Side:
    count = len(first.product.sources)

    def make(*wholes: Array) -> Array:
        return np.kron(first.product.make(*wholes[:count]), second.product.make(*wholes[count:]))

    shape = (first.shape[0] * second.shape[0], first.shape[1] * second.shape[1])
    return Side(shape, Product((*first.product.sources, *second.product.sources), make))


def _are_products(*pairs: tuple[Tensor, Tensor]) -> bool:
    return all(len(b.shape) == len(a.shape) == 2 and b.shape[1] == a.shape[0] for b, a in pairs)


def _itself(tensor: Tensor) -> Side:
    rows, columns = tensor.shape
    return Side((rows, columns), Product((tensor.name,), lambda whole: whole))


_MAKERS: Final[Mapping[Kind, Callable[[Parts, int], tuple[Side, Side] | None]]] = {
    Kind.ADALORA: _adalora,
    Kind.VERA: _vera,
    Kind.LOHA: _loha,
    Kind.LOKR: _lokr,
}
