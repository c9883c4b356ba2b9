"""Random PEFT configurations, saved by PEFT itself: the oracle of an adapter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from hypothesis import strategies as st

from tests.support.cases import cases

LAYERS = 3
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PATTERNS = cases(__file__, "PATTERNS")
"""Names and patterns of modules; one of them matches nothing, as it is no whole part of a name."""
TARGETS = cases(__file__, "TARGETS")


@dataclass(frozen=True)
class Draw:
    """An adapter to be."""

    config: dict[str, Any]
    file_dtype: str
    storage: str
    seed: int


@dataclass(frozen=True)
class Saved:
    """PEFT's values for one module of an adapter that it saved."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    delta: torch.Tensor
    c: torch.Tensor
    """Factors of its output: magnitudes over norms, or ones."""
    d: torch.Tensor
    """Additions to its output: the bias of B, scaled, or zeros."""


def _patterns(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    # PEFT sorts patterns when it saves them, so that only sorted ones mean the same before and after.
    made = st.dictionaries(st.sampled_from(PATTERNS), values, max_size=4)
    return made.map(lambda patterns: dict(sorted(patterns.items())))


RANKS = st.integers(1, 12)
ALPHAS = st.one_of(st.integers(1, 64), st.sampled_from((0.5, 5.5, 8 * 2**0.5, 31.7)))
SUBSETS = st.lists(st.sampled_from((*LEAVES, "embed_tokens", "lm_head")), min_size=1, unique=True)
OF_LAYERS = st.lists(st.sampled_from(LEAVES), min_size=1, unique=True)
"""Targets where there are vectors besides: those of embeddings and head are refused."""
LAYER_SUBSETS = st.one_of(
    st.none(), st.integers(0, LAYERS - 1), st.lists(st.integers(0, LAYERS - 1), min_size=1, unique=True)
)


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    """Configurations that PEFT accepts."""
    config: dict[str, Any] = {
        "r": draw(RANKS),
        "lora_alpha": draw(ALPHAS),
        "use_rslora": draw(st.booleans()),
        **draw(st.sampled_from(({}, {"use_dora": True}, {"lora_bias": True}))),
        "rank_pattern": draw(_patterns(RANKS)),
        "alpha_pattern": draw(_patterns(ALPHAS)),
    }
    if draw(st.integers(0, 3)) == 0:
        config["target_modules"] = draw(st.sampled_from(TARGETS))
    else:
        vectors = "use_dora" in config or "lora_bias" in config
        config["target_modules"] = draw(OF_LAYERS if vectors else SUBSETS)
        config["layers_to_transform"] = draw(LAYER_SUBSETS)
        if config["layers_to_transform"] is not None and draw(st.booleans()):
            config["layers_pattern"] = "layers"
        config["exclude_modules"] = draw(st.sampled_from((None, r".*\.layers\.1\.mlp\.down_proj", ["lm_head"])))
        if not _is_left(config):
            config |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    kinds = st.sampled_from(tuple(DTYPES))
    return Draw(config, draw(kinds), draw(kinds), draw(st.integers(0, 2**31)))


def _is_left(config: dict[str, Any]) -> bool:
    """Return True if something is left to be trained: PEFT refuses to train nothing."""
    layers, excluded = config["layers_to_transform"], config["exclude_modules"] or ()
    for leaf in config["target_modules"]:
        if leaf == "lm_head":
            left = "lm_head" not in excluded
        elif leaf == "embed_tokens":
            left = layers is None or layers == []
        else:
            left = leaf != "down_proj" or layers not in (1, [1]) or not isinstance(excluded, str)
        if left:
            return True
    return False


def _sides(module: torch.nn.Module) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """A and B: of embeddings they are no linears."""
    if isinstance(module, peft.tuners.lora.Embedding):
        return module.lora_embedding_A["default"], module.lora_embedding_B["default"]
    return module.lora_A["default"].weight, module.lora_B["default"].weight


def save(base: torch.nn.Module, draw: Draw, folder: Path) -> dict[str, Saved]:
    """Save a random adapter with PEFT and return its modules by name; the base is left as it was."""
    generator = torch.Generator().manual_seed(draw.seed)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **draw.config))
    adapted = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear | peft.tuners.lora.Embedding)
    }
    matrices = [side for module in adapted.values() for side in _sides(module)]
    for matrix in matrices:
        values = torch.randn(matrix.shape, generator=generator)
        matrix.data = values.to(DTYPES[draw.file_dtype])
    vectors = [
        *(module.lora_B["default"].bias for module in adapted.values() if module.lora_bias["default"]),
        *(module.lora_magnitude_vector["default"].weight for module in adapted.values() if module.lora_variant),
    ]
    for vector in vectors:
        vector.data = torch.rand(vector.shape, generator=generator) + 0.5
    model.save_pretrained(folder)
    for matrix in matrices:  # PEFT rounds the delta to the type of its matrices: look at it unrounded
        matrix.data = matrix.data.float()
    saved = {}
    for name, module in adapted.items():
        (a, b), delta = _sides(module), module.get_delta_weight("default").data
        delta = delta.T if isinstance(module, peft.tuners.lora.Embedding) else delta
        saved[name] = Saved(a.data, b.data, module.scaling["default"], delta, *_vectors(module))
    model.unload()
    return saved


def _vectors(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PEFT's factors of a module's output, and its additions."""
    c, d = torch.ones(module.out_features), torch.zeros(module.out_features)
    if module.lora_variant:
        layer, a, b = (module.lora_magnitude_vector, module.lora_A, module.lora_B)
        lora = b["default"].weight @ a["default"].weight
        norms = layer["default"].get_weight_norm(module.base_layer.weight, lora, module.scaling["default"])
        c = layer["default"].weight / norms
    if module.lora_bias["default"]:
        d = module.lora_B["default"].bias * module.scaling["default"]
    return c.data, d.data
