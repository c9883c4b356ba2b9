"""Phi-3 and Phi-4, dense: Llama with fused projections in the checkpoint, LongRoPE and partial rotation."""

from dataclasses import replace

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.family import Architecture, Family, llama_like, windowed
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.rope import RopeSpec, read_scaling, rope_block, rope_kind, rope_spec, rotated_part
from loramux_shared.bundle.modules import FUSED

OLD_NAMES = ("su", "yarn")
"""Names of LongRoPE in the first configs of Phi-3."""
NAMES = TensorNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    config.require("attention_bias", False)
    config.require("layer_types", None)
    model = llama_like(config, max_positions=4096, rope=_rope)
    window = config.integer_or_none("sliding_window", None)
    return replace(
        model,
        dims=replace(model.dims, fused=frozenset(FUSED)),
        layers=windowed(model.layers, config, window, lambda _: True),
        names=NAMES,
        norm_eps=config.number("rms_norm_eps", 1e-5),
    )


def _rope(config: HfConfig, head_dim: int, max_positions: int) -> tuple[RopeSpec, int]:
    """LongRoPE or plain; the original length stands beside the block, or is the class's own."""
    block = rope_block(config)
    if rope_kind(block) in OLD_NAMES:
        block = HfConfig({**block.fields, "rope_type": "longrope"}, config.architecture, config.max_seq_len)
    dim = int(head_dim * rotated_part(block, config))
    original = config.size("original_max_position_embeddings", 4096)
    scaling, longest = read_scaling(block, dim, max_positions, original, ("default", "longrope"))
    theta = block.number("rope_theta", config.number("rope_theta", 10000.0))
    return rope_spec(dim, theta, scaling), longest


FAMILY = Family(
    (Architecture("Phi3ForCausalLM", "phi3"),),
    _read,
    models="Phi-3 mini and medium, Phi-3.5 mini, Phi-4, Phi-4-mini",
)
