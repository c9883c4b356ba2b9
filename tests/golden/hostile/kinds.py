"""Kinds that amount to LoRA: products that would be giants, parts that do not fit together."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.golden.hostile.exhibit import ROOT, Exhibit, adapter, exhibit

Q = f"{ROOT}layers.0.self_attn.q_proj"
LOHA = {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16)}
ADALORA = {"lora_A": (4, 16), "lora_B": (16, 4), "lora_E": (4, 1)}
LOKR = {"lokr_w1": (4, 4), "lokr_w2": (4, 4)}
VERA = {"vera_lambda_b": (16,), "vera_lambda_d": (4,)}


def _kind(name: str, codes: str, kind: str, parts: dict[str, tuple[int, ...]], **more: Any) -> Exhibit:
    """Parts of q_proj in layer 0, of ones; ``of`` is put in place of the ones of its keys."""
    of, lora, base = more.pop("of", {}), more.pop("lora", {}), more.pop("base", {})

    def make(folder: Any) -> Any:
        values = {part: np.ones(shape, "f4") for part, shape in parts.items()} | of
        named = {part if "." in part else f"{Q}.{part}": value for part, value in values.items()}
        config = {"peft_type": kind, "r": 2, "target_modules": ["q_proj"]}
        return adapter(folder, named, **config | more)

    return exhibit(name, codes, make, lora={"dtype": "float32"} | lora, base=base)


REFUSED = (
    _kind("LoHa of rank 1,600", "E_RANK_MAX", "LOHA", {
        "hada_w1_a": (16, 40), "hada_w1_b": (40, 16), "hada_w2_a": (16, 40), "hada_w2_b": (40, 16)},
        r=40, lora={"truncate_to_rank": 4}),
    _kind("LoKr of 40 GB", "E_DIMS", "LOKR", {"lokr_w1": (1, 100_000), "lokr_w2": (1, 100_000)}),
    _kind("LoKr with a vector", "E_RANK_SHAPE", "LOKR", {"lokr_w1": (4, 4), "lokr_w2": (4,)}),
    _kind("LoKr with half a product", "E_PAIR", "LOKR", {"lokr_w1": (4, 4), "lokr_w2_a": (4, 1)}),
    _kind("LoHa of two ranks", "E_RANK_SHAPE", "LOHA", LOHA | {"hada_w2_b": (3, 16)}),
    _kind("LoHa of another rank than it says", "E_RANK_SHAPE", "LOHA", LOHA, r=3),
    _kind("LoHa without elements", "E_RANK_SHAPE", "LOHA", dict.fromkeys(LOHA, (0, 0))),
    _kind("LoHa in int8", "E_DTYPE", "LOHA", LOHA, of={"hada_w1_a": np.ones((16, 2), "i1")}),
    _kind("LoHa with NaN", "E_NAN", "LOHA", LOHA, of={"hada_w1_a": np.full((16, 2), np.nan, "f4")}),
    _kind("LoHa beyond float32", "E_NAN", "LOHA", LOHA, of={
        "hada_w1_b": np.full((2, 16), 1e30, "f4"), "hada_w2_b": np.full((2, 16), 1e30, "f4")}),
    _kind("LoHa under LoRA's name", "E_UNKNOWN_KEY", "LORA", LOHA),
    _kind("LoRA under LoHa's name", "E_UNKNOWN_KEY", "LOHA",
          {"lora_A.weight": (2, 16), "lora_B.weight": (16, 2)}),
    _kind("LoHa with DoRA", "E_VARIANT", "LOHA", LOHA, use_dora=True),
    _kind("LoHa with ranks as text", "E_BAD_CONFIG", "LOHA", LOHA, rank_pattern={"q_proj": "2"}),
    _kind("LoHa with an alpha as text", "E_BAD_CONFIG", "LOHA", LOHA, alpha="2"),
    _kind("AdaLoRA without singular values", "E_PAIR", "ADALORA", {"lora_A": (4, 16), "lora_B": (16, 4)}),
    _kind("AdaLoRA of too many singular values", "E_RANK_SHAPE", "ADALORA",
          ADALORA | {"lora_E": (5, 1)}, init_r=4),
    _kind("AdaLoRA with ranks as numbers", "E_RANK_SHAPE", "ADALORA", ADALORA, init_r=4,
          rank_pattern={"model.layers.0.self_attn.q_proj.lora_E": 2}),
    _kind("AdaLoRA with ranks as text", "E_BAD_CONFIG", "ADALORA", ADALORA, init_r=4,
          rank_pattern={"model.layers.0.self_attn.q_proj.lora_E": ["yes"]}),
    _kind("AdaLoRA of no modules that PEFT chooses", "E_BAD_CONFIG", "ADALORA", ADALORA, init_r=4,
          target_modules=None, base={"model_type": "mistral", "architectures": ["MistralForCausalLM"]}),
    _kind("IA3 under LoRA's name", "E_UNKNOWN_KEY", "LORA", {"ia3_l": (16, 1)}),
    _kind("LoRA under IA3's name", "E_UNKNOWN_KEY", "IA3",
          {"lora_A.weight": (2, 16), "lora_B.weight": (16, 2)}),
    _kind("IA3 of another width", "E_DIMS", "IA3", {"ia3_l": (17, 1)}),
    _kind("IA3 as a matrix", "E_DIMS", "IA3", {"ia3_l": (4, 4)}),
    _kind("IA3 of what q_proj reads", "E_MODULE", "IA3", {"ia3_l": (1, 16)}),
    _kind("IA3 of modules that it does not say", "E_TARGETS", "IA3", {"ia3_l": (16, 1)},
          target_modules=["v_proj"]),
    _kind("VeRA without projections", "E_PAIR", "VERA", VERA, r=4),
    _kind("VeRA with a key for its projections", "E_NOT_LORA", "VERA", VERA, r=4, save_projection=False),
    _kind("VeRA with narrow projections", "E_RANK_SHAPE", "VERA",
          VERA | {"base_model.vera_A": (4, 8), "base_model.vera_B": (16, 4)}, r=4),
)  # fmt: skip

ACCEPTED = (
    _kind("LoHa", "", "LOHA", LOHA),
    _kind("IA3", "", "IA3", {}, of={"ia3_l": np.full((16, 1), 2, "f4")}),
    _kind("LoKr, whole", "", "LOKR", LOKR),
    _kind("AdaLoRA", "", "ADALORA", ADALORA, init_r=4),
    _kind("VeRA", "", "VERA", VERA | {"base_model.vera_A": (4, 24), "base_model.vera_B": (24, 4)}, r=4),
)  # fmt: skip
