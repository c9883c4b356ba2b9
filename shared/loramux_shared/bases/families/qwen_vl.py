"""Qwen 2 VL, 2.5 VL and 3 VL, dense: models with images, of which the text decoder is served.

For text, all sections of their rope turn alike: it is that of Qwen 2 and 3.
"""

from collections.abc import Mapping
from dataclasses import replace

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.families.qwen2 import NAMES as NAMES_3, qwen_windows
from loramux_shared.bases.family import Architecture, Family, llama_like
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.rope import RopeSpec, read_rope, rope_block

PREFIXES = ("model.language_model.", "model.", "language_model.model.")
"""Prefixes since transformers 4.52, and before."""


def _rope(config: HfConfig, head_dim: int, max_positions: int, default_theta: float) -> tuple[RopeSpec, int]:
    """Return the rope for text; ``mrope`` is the old name of sections without a scaling."""
    block = dict(rope_block(config).fields)
    if "mrope" in (block.get("rope_type"), block.get("type")):
        block |= {"rope_type": "default", "type": "default"}
        config = HfConfig({**config.fields, "rope_scaling": block}, config.architecture, config.max_seq_len)
    return read_rope(config, head_dim, max_positions, default_theta)


def _rope_2(config: HfConfig, head_dim: int, max_positions: int) -> tuple[RopeSpec, int]:
    return _rope(config, head_dim, max_positions, 1_000_000.0)


def _rope_3(config: HfConfig, head_dim: int, max_positions: int) -> tuple[RopeSpec, int]:
    return _rope(config, head_dim, max_positions, 500_000.0)


def _read_2(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    model = llama_like(config, max_positions=32768, sizes={"num_key_value_heads": 8}, rope=_rope_2)
    return replace(
        model,
        layers=qwen_windows(model, config, first=80),
        names=TensorNames(prefixes=PREFIXES),
        norm_eps=config.number("rms_norm_eps", 1e-5),
        qkv_bias=True,
    )


FAMILY_2 = Family(
    (
        Architecture("Qwen2VLForConditionalGeneration", "qwen2_vl", nested=True, flat=True),
        Architecture("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", nested=True, flat=True),
    ),
    _read_2,
    models="Qwen 2 VL and 2.5 VL",
)


def qwen3_vl_like(config: HfConfig, sizes: Mapping[str, int]) -> ModelConfig:
    """Return a decoder of Qwen 3 VL with dense MLPs; sizes are those of its class."""
    config.require("hidden_act", "silu")
    model = llama_like(config, max_positions=128000, sizes=sizes, rope=_rope_3)
    bias = config.flag("attention_bias", default=False)
    return replace(model, names=replace(NAMES_3, prefixes=PREFIXES), qkv_bias=bias, o_bias=bias)


def _read_3(config: HfConfig) -> ModelConfig:
    return qwen3_vl_like(config, {"num_key_value_heads": 32, "head_dim": 128})


FAMILY_3 = Family(
    (Architecture("Qwen3VLForConditionalGeneration", "qwen3_vl", nested=True, flat=True, untied=True),),
    _read_3,
    models="Qwen 3 VL, dense",
)
