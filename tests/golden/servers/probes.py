"""The shapes that are tried at other servers: the wild ones, and a few that show one feature alone.

Servers need wider heads than the wild shapes have, so that each feature of a tensor is eight here.
"""

import re
from dataclasses import replace
from typing import Any, Final

import numpy as np

from tests.golden.wild.bases import BASES
from tests.golden.wild.shape import Shape, made, of_peft
from tests.golden.wild.shapes import ALL, SHAPES, L, M
from tests.support.adapters import HIDDEN, Tensors

TIMES: Final = 8
"""Features of a server's base for each one of the wild shapes."""
_SIZES: Final = ("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim")
_VOCABULARY: Final = re.compile(r"embed_tokens|lm_head|embedding")
# Axes of features by the last words of a key, counted from the end; those that are left out have none.
_FEATURES: Final = (
    (re.compile(r"lora_embedding_A|score\.bias|lora_E|lambda_d|trainable_tokens_original"), ()),
    (re.compile(r"lora_embedding_B"), (-2,)),
    (re.compile(r"\.lora_(A|a|down)(\.|$)|linear_in|trainable_tokens_delta|score\.weight|vera_A"), (-1,)),
    (re.compile(r"\.lora_B(\.\w+)?\.bias|magnitude_vector|lambda_b"), (-1,)),
    (re.compile(r"\.lora_(B|b|up)(\.|$)|vera_B|hada_w\d_a|lokr_w2_a"), (-2,)),
    (re.compile(r"hada_w\d_b|lokr_w2_b|(embed_tokens|lm_head)(\.modules_to_save\.default)?\.weight"), (-1,)),
    (re.compile(r"ia3_l"), (-2, -1)),
)
WIDE_BASES: Final[dict[str, dict[str, Any]]] = {}


def _wide(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a base's config with wider layers, and weights that give it opinions."""
    wide = {name: value * TIMES if name in _SIZES else value for name, value in fields.items()}
    text = wide.get("text_config")
    return wide | ({"text_config": _wide(text)} if text else {}) | {"initializer_range": 0.15}


WIDE_BASES |= {name: _wide(fields) for name, fields in BASES.items()}
# llama.cpp takes these for granted.
WIDE_BASES["gemma3"]["text_config"]["query_pre_attn_scalar"] = 32
WIDE_BASES["qwen3_moe"]["norm_topk_prob"] = True


def widened(name: str, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a tensor of the wider base in float32, with values that change its answers visibly."""
    if "vision_tower" in name:
        return value.astype(np.float32)
    axes = next((axes for pattern, axes in _FEATURES if pattern.search(name)), ())
    shape = list(value.shape)
    for axis in axes:
        vocabulary = _VOCABULARY.search(name) and axis == -2 and ".lora_B" in name
        if len(shape) >= -axis and shape[axis] > 1 and not vocabulary:
            shape[axis] *= TIMES
    if value.size and (value == value.flat[0]).all() and value.size > 1:
        return np.full(shape, value.flat[0], np.float32)
    drawn = np.random.default_rng([len(name), *name.encode()]).normal(size=shape).astype(np.float32)
    return 2.0 + drawn * 0.3 if "magnitude" in name else drawn * 0.2


def wide(shape: Shape) -> Shape:
    """Return a shape for the wider base."""
    if shape.tensors is None:
        return shape
    values = {name: widened(name, value) for name, value in shape.tensors().items()}
    return replace(shape, tensors=lambda: values)


def _probe(what: str, tensors: Tensors, **changes: Any) -> Shape:
    return Shape("probe", "any", what, of_peft("0.12", **changes), lambda: tensors)


_HEAD: Final = {
    "base_model.model.lm_head.lora_A.weight": (4, HIDDEN),
    "base_model.model.lm_head.lora_B.weight": (32, 4),
}
_EMBEDDING: Final = {
    f"{M}embed_tokens.lora_embedding_A": (4, 32),
    f"{M}embed_tokens.lora_embedding_B": (HIDDEN, 4),
}


def _without_b() -> Tensors:
    return {name: value for name, value in made().items() if ".1.self_attn.v_proj.lora_B" not in name}


PROBES: Final = [
    _probe("LoRA of the head", made(beside=_HEAD), target_modules=["q_proj", "v_proj", "lm_head"]),
    _probe("LoRA of embeddings", made(beside=_EMBEDDING), target_modules=["q_proj", "v_proj", "embed_tokens"]),
    _probe("rank 80, where the ceiling is 64", made(rank=80), r=80),
    _probe("q_proj alone", made(("q_proj",)), target_modules=["q_proj"]),
    _probe("k_proj without v_proj", made(("q_proj", "k_proj")), target_modules=["q_proj", "k_proj"]),
    _probe("gate_proj without up_proj", made(("gate_proj",)), target_modules=["gate_proj"]),
    _probe("down_proj alone", made(("down_proj",)), target_modules=["down_proj"]),
    _probe("`use_qalora`", made(), use_qalora=True, qalora_group_size=16),
    _probe("rsLoRA with `rank_pattern`", made(rank=4), use_rslora=True, r=8,
           rank_pattern={"q_proj": 4, "v_proj": 4}),
    _probe("`alpha_pattern` alone", made(), alpha_pattern={"v_proj": 3}),
    _probe("ranks that the config does not name", made(rank=8), r=4),
    _probe("all B zero", {name: value * (".lora_B." not in name) for name, value in made().items()}),
    _probe("a layer that the base lacks", made(layers=3)),
    _probe("A without B", _without_b()),
    _probe("`bias: all`, with biases of the base's modules",
           made(parts={"q_proj": {"base_layer.bias": (16,)}}), bias="all"),
    _probe("router of a mixture", made(("q_proj",), beside={f"{L}0.mlp.gate.lora_A.weight": (4, HIDDEN),
           f"{L}0.mlp.gate.lora_B.weight": (3, 4)}), target_modules=["q_proj", "gate"]),
    _probe("all linears", made(tuple(ALL)), target_modules=ALL),
    _probe("of a model with images, at its decoder alone", made(renamed={M: f"{M}language_model."})),
]  # fmt: skip
TRIED: Final = [*SHAPES, *PROBES]
