"""A decoder of Llama's shape with random weights, and random adapters for it: no files."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from inference_service.engine.lora.weights import AdapterWeights, Placed, arrange
from inference_service.engine.models.packed import Kept
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.read import read_fields
from loramux_shared.bundle.modules import BY_NAME

LLAMA_8B: Final[dict[str, Any]] = (
    {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    | {"num_attention_heads": 32, "num_key_value_heads": 8}
    | {"max_position_embeddings": 8192, "rope_theta": 500000.0}
)
TINY: Final[dict[str, Any]] = (
    {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 260}
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    | {"max_position_embeddings": 256, "rope_theta": 500000.0}
)
QWEN3_30B_A3B: Final[dict[str, Any]] = (
    {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "vocab_size": 151936}
    | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    | {"max_position_embeddings": 40960, "rope_theta": 1000000.0}
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
)
SCALE: Final = 0.02


def config_fields(shape: dict[str, Any]) -> dict[str, Any]:
    """Return ``config.json`` of a shape."""
    family = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    usual = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 1}
    return family | usual | shape


def config_of(shape: dict[str, Any]) -> ModelConfig:
    """The configuration of a shape."""
    return read_fields(config_fields(shape))


class RandomTensors:
    """Stands in for a checkpoint: whatever is asked for is drawn on the device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device

    def has(self, name: str) -> bool:
        """No tied model has a head."""
        return "lm_head" not in name

    def shape(self, _name: str) -> None:
        """Every tensor has the shape that `get` takes."""

    def first(self, names: Sequence[str]) -> str:
        """Every name is there."""
        return names[0]

    def get(self, _name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Weights of norms are about 1, others small; a number is read on the host."""
        device = "cpu" if shape == (1,) else self.device
        drawn = torch.randn(shape, dtype=dtype or self.dtype, device=device).mul_(SCALE)
        return drawn.add_(1.0) if len(shape) == 1 else drawn

    def kept(self, _names: Sequence[tuple[str, tuple[int, ...]]], _kind: type[Kept]) -> None:
        """Return None: no tensor is of few bits."""


def random_adapter(config: ModelConfig, rank: int, dtype: torch.dtype, scale: float = SCALE) -> AdapterWeights:
    """Return an adapter of a rank in all modules but experts, in the host's memory; layers share matrices."""
    rows: list[Placed] = []
    first = 0
    for group in [each for each in config.groups if each.expert is None]:
        for module, out in zip(group.modules, group.out_features, strict=True):
            rows.append(Placed(0, BY_NAME[module].id, rank, group.in_features, out, first))
            first += rank * (group.in_features + out)
    every = [row._replace(layer=layer) for layer in range(config.dims.num_layers) for row in rows]
    values = torch.randn(first, dtype=dtype) * scale
    return arrange(values, every, config.layer_groups)
