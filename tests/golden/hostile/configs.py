"""Configs of unsupported adapters, configs that lie, and configs that attack their reader."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from builder_service.domain.rules.adapter import MAX_CONFIG_BYTES
from tests.golden.hostile.exhibit import BASE, CONFIG, Exhibit, adapter, exhibit, of_config, of_config_text
from tests.support.adapters import ADAPTER_CONFIG, tensors
from tests.support.cases import cases

_HEAD = f'"peft_type": "LORA", "base_model_name_or_path": "{BASE}", "target_modules": ["q_proj", "v_proj"]'
# 2 ** 30 ways to read a name of thirty characters, none of which ends as the pattern does.
EXPONENTIAL = r"(?:[a-z._0-9]|[a-z._0-9])*[^a-z._0-9]"
GIANT = "a{16000000}"
"""A pattern of twelve characters that takes some readers seconds and gigabytes."""


def _huge(folder: Path) -> None:
    adapter(folder)
    (folder / CONFIG).write_text(json.dumps(ADAPTER_CONFIG | {"filler": "x" * MAX_CONFIG_BYTES}))


def _of_values(name: str, codes: str, change: Callable[[str, Any], Any], **settings: Any) -> Exhibit:
    """Return an exhibit of good tensors that were changed, by their names."""
    changed = {key: change(key, value) for key, value in tensors().items()}
    return exhibit(name, codes, lambda folder: adapter(folder, changed), **settings)


REFUSED = (
    *(of_config(name, codes, **config) for name, codes, config in cases(__file__, "REFUSED")),
    of_config("rank of 400 digits", "E_BAD_CONFIG", r=10**400),
    of_config("pattern of 5000 characters", "E_BAD_CONFIG", rank_pattern={"a" * 5000: 4}),
    of_config("exponential rank_pattern", "E_BAD_CONFIG", rank_pattern={EXPONENTIAL: 4}),
    of_config("exponential alpha_pattern", "E_BAD_CONFIG", alpha_pattern={EXPONENTIAL: 4}),
    of_config("exponential target_modules", "E_BAD_CONFIG", target_modules=EXPONENTIAL),
    of_config("exponential exclude_modules", "E_BAD_CONFIG", exclude_modules=EXPONENTIAL),
    of_config("exponential layers_pattern", "E_BAD_CONFIG", layers_pattern=f"{EXPONENTIAL}x",
              layers_to_transform=1),
    of_config("8,000 saved modules", "E_BAD_CONFIG", modules_to_save=[f"m{i}" for i in range(8000)]),
    of_config("a base's class of a megabyte", "E_BASE",
              auto_mapping={"base_model_class": "x" + "ForA" * 250_000 + "!"}),
    of_config("a base's name of a megabyte", "E_BAD_CONFIG", base_model_name_or_path="x" * 1_000_000),
    exhibit("tensors that PEFT does not choose", "E_TARGETS",
            lambda folder: adapter(folder, tensors(("gate_proj",)), target_modules=None)),
    of_config_text("NaN in JSON", "E_BAD_CONFIG", lambda: f'{{{_HEAD}, "r": 4, "lora_alpha": NaN}}'),
    of_config_text("number beyond float", "E_BAD_CONFIG", lambda: f'{{{_HEAD}, "r": 4, "lora_alpha": 1e999}}'),
    of_config_text("int of 10,000 digits", "E_BAD_CONFIG", lambda: f'{{{_HEAD}, "r": {"9" * 10_000}}}'),
    of_config_text("duplicate key", "E_BAD_CONFIG", lambda: f'{{{_HEAD}, "r": 4, "lora_alpha": 8, "r": 8}}'),
    of_config_text("9,000 patterns", "E_BAD_CONFIG",
                   lambda: f'{{{_HEAD}, "rank_pattern": {json.dumps({f"q{i}": 4 for i in range(9000)})}}}'),
    of_config_text("deep brackets", "E_BAD_CONFIG", lambda: "[" * 100_000),
    of_config_text("deep value", "E_BAD_CONFIG", lambda: f'{{{_HEAD}, "r": {"[" * 200}{"]" * 200}}}'),
    of_config_text("list", "E_BAD_CONFIG", lambda: "[]"),
    of_config_text("empty file", "E_BAD_CONFIG", lambda: ""),
    exhibit("config of 4 MiB", "E_BAD_CONFIG", _huge),
    of_config("invocation of 65 tokens", "E_ALORA", alora_invocation_tokens=[1] * 65),
    *(of_config(kind, "E_TASK", task_type=kind) for kind in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")),
)  # fmt: skip

ACCEPTED = (
    *(of_config(name, codes, **config) for name, codes, config in cases(__file__, "ACCEPTED")),
    of_config("small alpha", "W_ALPHA", lora_alpha=2**-9),
    of_config("giant rank_pattern", "", rank_pattern={GIANT: 8}),
    of_config("invocation of 64 tokens", "", alora_invocation_tokens=[31] * 64),
    exhibit("no target_modules", "W_TARGETS", lambda folder: adapter(folder, target_modules=None)),
    of_config("a copy of the base", "", base_model_name_or_path=f"unsloth/{BASE}-unsloth-bnb-4bit"),
    *(of_config(f"init {kind}", "", init_lora_weights=kind)
      for kind in ("gaussian", "eva", "mica", "orthogonal", False)),
    of_config("full names as targets", "", target_modules=[
        f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 1) for m in "qv"], layers_to_transform=[7]),
    exhibit("full names in patterns", "W_NARROWED", lambda folder: adapter(
        folder,
        {name: value[:3] if "q_proj.lora_A" in name else value[:, :3] if "q_proj" in name else value
         for name, value in tensors().items()},
        rank_pattern={f"model.layers.{i}.self_attn.q_proj": 3 for i in (0, 1)},
        alpha_pattern={f"model.layers.{i}.self_attn.q_proj": 6.5 for i in (0, 1)}, init_lora_weights="eva")),
    _of_values("float32", "W_NARROWED", lambda _, value: value.astype("f4") * 1.01),
    _of_values("float16", "W_NARROWED", lambda _, value: value.astype("f2") * np.float16(1.01)),
    _of_values("bfloat16 in float32 and in float16", "",
               lambda name, value: value.astype("f4" if "A" in name else "f2")),
    exhibit("the same, exact", "", lambda folder: adapter(folder, lora_alpha=12), lora={"dtype": "float32"}),
    _of_values("underflow", "W_UNDERFLOW",
               lambda _, value: np.where(value > 0.5, 1, 2.0**-30).astype(ml_dtypes.bfloat16),
               lora={"dtype": "float16"}),
)  # fmt: skip
