"""Kinds that amount to LoRA: products that would be giants, parts that do not fit together."""

from typing import Any

import numpy as np

from tests.golden.hostile.exhibit import ROOT, Exhibit, adapter, exhibit
from tests.support.cases import cases

Q = f"{ROOT}layers.0.self_attn.q_proj"
LOHA = {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16)}


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
    *(_kind(*row, **more) for *row, more in cases(__file__, "REFUSED")["_kind"]),
    _kind("LoHa in int8", "E_DTYPE", "LOHA", LOHA, of={"hada_w1_a": np.ones((16, 2), "i1")}),
    _kind("LoHa with NaN", "E_NAN", "LOHA", LOHA, of={"hada_w1_a": np.full((16, 2), np.nan, "f4")}),
    _kind("LoHa beyond float32", "E_NAN", "LOHA", LOHA, of={
        "hada_w1_b": np.full((2, 16), 1e30, "f4"), "hada_w2_b": np.full((2, 16), 1e30, "f4")}),
)  # fmt: skip

ACCEPTED = (
    *(_kind(*row, **more) for *row, more in cases(__file__, "ACCEPTED")["_kind"]),
    _kind("IA3", "", "IA3", {}, of={"ia3_l": np.full((16, 1), 2, "f4")}),
)  # fmt: skip
