"""An adapter as every server reads it: LoRA under PEFT's names, with one rank, one scale and no patterns."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from builder_service.domain.kinds import as_lora, kind_of
from builder_service.domain.pairs import Pair
from builder_service.domain.peft_kinds.lora import LORA
from builder_service.domain.rules.config import ON_BASE_OK
from builder_service.domain.rules.tensor_passes import TensorCheck
from loramux_shared.bases.families import load_families
from loramux_shared.bundle.modules import FUSED, NO_LAYER
from loramux_shared.bundle.npy import Array, cast
from loramux_shared.deployment import Dtype
from loramux_shared.faults import Finding

_ROOT: Final = "base_model.model."
_LAYERS: Final = "layers."
_CHOOSING: Final = ("exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
"""Fields that choose modules by their names, beside `target_modules`."""
_PLAIN_FIELDS: Final[Mapping[str, Any]] = {
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
    "modules_to_save": None,
}


@dataclass(frozen=True)
class PlainModule:
    """A and B of a module."""

    name: str
    """The module's name in the base, as transformers has it."""
    pair: Pair
    scale: float

    @property
    def keys(self) -> tuple[str, str]:
        """The names of A and B in PEFT's files."""
        of_embedding = self.pair.key.path == "embed_tokens"
        a, b = ("lora_embedding_A", "lora_embedding_B") if of_embedding else ("lora_A.weight", "lora_B.weight")
        return f"{_ROOT}{self.name}.{a}", f"{_ROOT}{self.name}.{b}"


@dataclass(frozen=True)
class PlainLora:
    """The modules of an adapter, and the rank and the scale that all of them are written with."""

    check: TensorCheck
    modules: tuple[PlainModule, ...]
    """By name."""
    rank: int
    scale: float
    alpha: float

    @property
    def folded(self) -> list[PlainModule]:
        """Modules whose scale is written into B."""
        return [module for module in self.modules if module.scale != self.scale]

    @property
    def padded(self) -> list[PlainModule]:
        """Modules of a lower rank than the highest."""
        return [module for module in self.modules if module.pair.a.shape[0] < self.rank]

    @property
    def renamed(self) -> list[tuple[str, str]]:
        """The tensors of the file that get other names: the old name and the new one."""
        names = [
            (old.name, new)
            for module in self.modules
            for old, new in zip((module.pair.a, module.pair.b), module.keys, strict=True)
        ]
        return [(old, new) for old, new in names if old != new and self.check.file.origins(old) == (old,)]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor that is written."""
        shapes: dict[str, tuple[int, ...]] = {}
        for module in self.modules:
            a, b = module.keys
            shapes[a] = (self.rank, module.pair.a.shape[1])
            shapes[b] = (module.pair.b.shape[0], self.rank)
        return shapes

    def tensors(self) -> Iterator[tuple[str, Array]]:
        """Yield each tensor that is written, in the order of `shapes`."""
        for module in self.modules:
            a, b = (self.check.file.read(tensor.name) for tensor in (module.pair.a, module.pair.b))
            if module.scale != self.scale:
                b = narrowest(cast(b, Dtype.FLOAT32, module.scale), b.dtype)
            more = self.rank - len(a)
            yield module.keys[0], np.pad(a, ((0, more), (0, 0)))
            yield module.keys[1], np.pad(b, ((0, 0), (0, more)))

    def served(self) -> Iterator[tuple[str, Array, Array]]:
        """Yield each module's name with A and B as they are served: in float32, the scale in B."""
        for module in self.modules:
            a, b = (self.check.file.read(tensor.name) for tensor in (module.pair.a, module.pair.b))
            yield module.name, cast(a, Dtype.FLOAT32), cast(b, Dtype.FLOAT32, module.scale)

    def fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config that is written, from the fields of the adapter's own."""
        lora = as_lora(kind_of(fields) or LORA, dict(fields))
        alpha = int(self.alpha) if self.alpha.is_integer() else self.alpha
        required = {"peft_type": LORA.peft_type, "r": self.rank, "lora_alpha": alpha}
        plain = lora | {name: value for name, value in required.items() if lora.get(name) != value}
        plain |= {
            name: value for name, value in _PLAIN_FIELDS.items() if plain.get(name, value) not in (value, [])
        }
        if str(plain.get("init_lora_weights", True)).lower() not in ON_BASE_OK:
            plain["init_lora_weights"] = True
        targets = plain.get("target_modules")
        if self.renamed or not (isinstance(targets, list) or targets == "all-linear"):
            plain["target_modules"] = sorted({module.name.rpartition(".")[2] for module in self.modules})
            plain |= {name: None for name in _CHOOSING if plain.get(name) not in (None, [], "")}
        return plain


def plain_lora(check: TensorCheck) -> PlainLora:
    """Return an adapter that passed its check, and that `beside_lora` says nothing about, as plain LoRA."""
    scale_of = check.config.scale_of
    found = [
        PlainModule(_name_of(pair, check), pair, scale_of(pair.key.name, pair.trained_rank))
        for pair in check.pairs
    ]
    modules = tuple(sorted(found, key=lambda module: module.name))
    rank = max(module.pair.a.shape[0] for module in modules)
    scales = {module.scale for module in modules}
    scale = scales.pop() if len(scales) == 1 else 0.0
    alpha = alpha_of(scale, rank)
    return PlainLora(check, modules, rank, *((1.0, float(rank)) if alpha is None else (scale, alpha)))


def alpha_of(scale: float, rank: int) -> float | None:
    """Return the alpha that divided by the rank is the scale in float32; None where there is none."""
    near = scale * rank
    found = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    same = (alpha for alpha in found if np.float32(alpha / rank) == np.float32(scale) != 0)
    return next(same, None)


def _name_of(pair: Pair, check: TensorCheck) -> str:
    """Return a module's name in the base: keys of older releases and of parts of models have others."""
    key, base = pair.key, check.base
    if base.layer_names or check.config.encodes or base.encodes:
        return key.name
    root = "model.language_model." if load_families()[base.architecture][0].nested else "model."
    if key.layer == NO_LAYER:
        return f"{root}{key.path}" if key.path == "embed_tokens" else key.path
    return f"{root}{_LAYERS}{key.name.partition(_LAYERS)[2]}"


def narrowest(wide: Array, dtype: np.dtype[Any]) -> Array:
    """Return float32 values in a type, if it holds them as they are; else as they are."""
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = wide.astype(dtype)
        return narrow if np.array_equal(narrow.astype(np.float32), wide) else wide


_MERGE: Final = "Merge it into the base (merge_and_unload) and serve a full model"
_BESIDE: Final = {
    "scales, biases or magnitudes of DoRA beside A and B": f"{_MERGE}, or train without them.",
    "rows of embeddings or of a head": f"{_MERGE}, or train LoRA of embed_tokens and lm_head (target_modules).",
    "a score head": "Serve it with a program that knows classifiers; its LoRA alone gives no scores.",
    "tokens from which on it acts (alora_invocation_tokens)": "Train without alora_invocation_tokens.",
    "tensors of a tower for images or sound": "Train with exclude_modules for the tower.",
    "parameters of experts (target_parameters)": f"{_MERGE}, or train linears of experts.",
    "parts of a linear that is fused in the base": "Train the base's own qkv_proj or gate_up_proj.",
    "no A and B": "It changes nothing: leave it out.",
}


def beside_lora(check: TensorCheck) -> list[Finding]:
    """Return a finding for each thing that an adapter does and that no A and B can do."""
    keys = [pair.key for pair in check.pairs]
    fused = {module for name in check.base.dims.fused for module in FUSED.get(name, ())}
    there = (
        check.vectors.rows,
        check.replaced or check.vocab,
        check.score,
        check.config.invocation_tokens,
        check.towers,
        any(key.of_parameter for key in keys),
        any(len(key.modules) == 1 and key.modules[0] in fused for key in keys),
        not keys and not check.vectors.rows and not check.replaced,
    )
    expected = "A and B of linears, embeddings and a head, and nothing else"
    return [
        Finding(code="E_NO_FIX", expected=expected, found=what, fix=fix)
        for (what, fix), found in zip(_BESIDE.items(), there, strict=True)
        if found
    ]


def differences(before: PlainLora, after: PlainLora) -> list[str]:
    """Return the modules that are served otherwise than before; those of a higher rank end with zeros."""
    names, theirs = ({module.name for module in each.modules} for each in (before, after))
    if names != theirs:
        return sorted(names ^ theirs)
    differ = []
    for (name, a, b), (_, wide_a, wide_b) in zip(before.served(), after.served(), strict=True):
        rank = len(a)
        same = np.array_equal(wide_a[:rank], a) and np.array_equal(wide_b[:, :rank], b)
        if not same or wide_a[rank:].any() or wide_b[:, rank:].any():
            differ.append(name)
    return differ
