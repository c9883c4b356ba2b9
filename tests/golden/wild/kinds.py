"""Adapters of other kinds than LoRA, as PEFT writes them."""

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from tests.golden.wild.shape import NAME, Shape, beside, of_peft, only
from tests.support.adapters import FEATURES, Tensors

_ROOT: Final = "base_model.model.model.layers"
_COMMON: Final[dict[str, Any]] = {
    "auto_mapping": None, "base_model_name_or_path": NAME, "inference_mode": True, "layers_pattern": None,
    "layers_to_transform": None, "modules_to_save": None, "peft_version": "0.21.2", "revision": None,
    "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"],
}  # fmt: skip
_ADALORA: Final = of_peft(peft_type="ADALORA", r=8, init_r=4, target_r=2, beta1=0.85, beta2=0.85, deltaT=1,
                          orth_reg_weight=0.5, tfinal=0, tinit=0, total_step=10, rank_pattern=None)  # fmt: skip
_VERA: Final = _COMMON | {
    "peft_type": "VERA", "bias": "none", "d_initial": 0.1, "fan_in_fan_out": False, "init_weights": True,
    "projection_prng_key": 0, "r": 4, "save_projection": True, "vera_dropout": 0.0,
    "target_modules": ["q_proj", "down_proj"],
}  # fmt: skip
_IA3: Final = {key: value for key, value in _COMMON.items() if not key.startswith("layers")} | {
    "peft_type": "IA3", "exclude_modules": None, "fan_in_fan_out": False, "init_ia3_weights": True,
    "feedforward_modules": ["down_proj"], "target_modules": ["k_proj", "down_proj", "v_proj"],
}  # fmt: skip
_LYCORIS: Final = _COMMON | {
    "alpha": 5, "alpha_pattern": {}, "exclude_modules": None, "init_weights": True, "module_dropout": 0.0,
    "r": 3, "rank_dropout": 0.0, "rank_pattern": {}, "use_effective_conv2d": False,
}  # fmt: skip
_LOHA: Final = _LYCORIS | {"peft_type": "LOHA"}
_LOKR: Final = _LYCORIS | {
    "peft_type": "LOKR", "decompose_both": False, "decompose_factor": -1, "rank_dropout_scale": False,
}  # fmt: skip

Parts = Callable[[int, int], dict[str, tuple[int, ...]]]


def _of(*modules: str, layers: int = 2) -> Callable[[Parts], Callable[[], Tensors]]:
    """Return the function that makes tensors of modules of parts, whose shapes follow from in and out."""

    def keys(parts: Parts) -> Iterator[tuple[str, tuple[int, ...]]]:
        for layer in range(layers):
            for module in modules:
                group = "mlp" if module == "down_proj" else "self_attn"
                for part, shape in parts(*FEATURES[module]).items():
                    yield f"{_ROOT}.{layer}.{group}.{module}.{part}", shape

    return lambda parts: only(*keys(parts))


def _adalora(rank: int, suffix: str = "") -> Parts:
    return lambda inside, out: {
        f"lora_A{suffix}": (rank, inside), f"lora_B{suffix}": (out, rank), f"lora_E{suffix}": (rank, 1),
    }  # fmt: skip


def _vera(*, projections: bool = True) -> Callable[[], Tensors]:
    own = _of("q_proj", "down_proj")(lambda _, out: {"vera_lambda_b": (out,), "vera_lambda_d": (4,)})
    shared = (("base_model.vera_A", (4, 24)), ("base_model.vera_B", (16, 4)))
    return beside(*shared, of=own) if projections else own


def _loha(rank: int) -> Parts:
    return lambda inside, out: {
        "hada_w1_a": (out, rank), "hada_w1_b": (rank, inside),
        "hada_w2_a": (out, rank), "hada_w2_b": (rank, inside),
    }  # fmt: skip


def _lokr(inside: int, out: int) -> dict[str, tuple[int, ...]]:
    return {"lokr_w1": (2, 4), "lokr_w2_a": (out // 2, 1), "lokr_w2_b": (1, inside // 4)}


def _lokr_of_products(inside: int, out: int) -> dict[str, tuple[int, ...]]:
    first = 4 if out > 8 else 2
    return {
        "lokr_w1_a": (first, 1),
        "lokr_w1_b": (1, 4),
        "lokr_w2_a": (out // first, 1),
        "lokr_w2_b": (1, inside // 4),
    }


_BOTH: Final = _of("q_proj", "v_proj")
_UNCHANGED: Final = {
    "model.layers.0.self_attn.q_proj.lora_E": [True, False, True, True],
    "model.layers.0.self_attn.v_proj.lora_E": [False] * 4,
    "model.layers.1.self_attn.q_proj.lora_E": [True] * 4,
    "model.layers.1.self_attn.v_proj.lora_E": [False, False, False, True],
}


def _pruned() -> Tensors:
    """Return the rest of the singular values, and of the rows and columns of each."""
    made = _BOTH(_adalora(4))()
    for name, flags in _UNCHANGED.items():
        module = f"base_model.model.{name.removesuffix('.lora_E')}"
        for part, axis in (("lora_A", 0), ("lora_B", 1), ("lora_E", 0)):
            made[f"{module}.{part}"] = np.compress(flags, made[f"{module}.{part}"], axis)
    return made


def _kind(
    what: str, config: dict[str, Any], tensors: Callable[[], Tensors] | None, codes: str = "", **more: Any
) -> Shape:
    return Shape("PEFT", config["peft_type"], what, config, tensors, codes, **more)


_SCALES: Final = _of("k_proj", "v_proj", "down_proj")(
    lambda inside, out: {"ia3_l": (1, inside) if (inside, out) == FEATURES["down_proj"] else (out, 1)}
)


SHAPES: Final = (
    _kind("AdaLoRA", _ADALORA, _BOTH(_adalora(4))),
    _kind("AdaLoRA, ranks allocated: some modules have none", _ADALORA | {"rank_pattern": _UNCHANGED}, _pruned),
    _kind("AdaLoRA, raw: the adapter's name in the keys", _ADALORA, _BOTH(_adalora(4, ".default")),
          under={".default": ""}),
    _kind("AdaLoRA whose tensors have other ranks", _ADALORA, _BOTH(_adalora(3)), "E_RANK_SHAPE"),
    _kind("VeRA with its projections", _VERA, _vera()),
    _kind("VeRA, of whose projections there is only a key", _VERA | {"save_projection": False},
          _vera(projections=False), "E_NOT_LORA"),
    _kind("LoHa: rank r * r", _LOHA, _BOTH(_loha(3))),
    _kind("LoHa, ranks and alphas by patterns",
          _LOHA | {"rank_pattern": {".*_proj": 2}, "alpha_pattern": {"v_proj": 7}}, _BOTH(_loha(2))),
    _kind("LoHa above the ceiling", _LOHA | {"r": 9}, _BOTH(_loha(9)), "E_RANK_MAX"),
    _kind("LoKr with a whole factor", _LOKR | {"r": 1, "target_modules": ["v_proj"]}, _of("v_proj")(_lokr)),
    _kind("IA3: scales of keys, values, and what down_proj reads", _IA3,
          _SCALES),
    _kind("IA3 as training begins: all scales are 1", _IA3,
          lambda: {key: np.ones_like(scale) for key, scale in _SCALES().items()}, "W_ZERO_B"),
    _kind("IA3 that scales what o_proj reads", _IA3 | {"target_modules": ["o_proj"]},
          _of("o_proj")(lambda inside, _: {"ia3_l": (1, inside)}), "E_MODULE"),
    _kind("LoKr of two products", _LOKR | {"r": 1, "decompose_both": True}, _BOTH(_lokr_of_products)),
    *(Shape("PEFT", kind, "another kind", _COMMON | {"peft_type": kind}, None,
            files=("adapter_model.safetensors",), codes="E_NOT_LORA")
      for kind in ("BOFT", "OFT", "HRA", "FOURIERFT", "DELORA", "VBLORA", "LN_TUNING", "PROMPT_TUNING",
                   "PREFIX_TUNING", "P_TUNING", "RANDLORA", "SHIRA", "POLY")),
)  # fmt: skip
