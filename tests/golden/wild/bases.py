"""The bases of the shapes: small ones of transformers."""

from __future__ import annotations

from typing import Any, Final

from tests.support.adapters import BASE_CONFIG

_TEXT: Final[dict[str, Any]] = {key: value for key, value in BASE_CONFIG.items() if not key.startswith("arch")}
_SIZES: Final[dict[str, Any]] = {key: value for key, value in _TEXT.items() if key != "model_type"}
_VISION: Final[dict[str, Any]] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
BASES: Final[dict[str, dict[str, Any]]] = {
    "llama": BASE_CONFIG,
    "phi3": BASE_CONFIG
    | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0, "sliding_window": None},
    "gemma3": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": _SIZES | {"model_type": "gemma3_text", "head_dim": 4},
        "vision_config": _VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
    "qwen3_moe": BASE_CONFIG
    | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "head_dim": 4,
    },
}
"""Fields of ``config.json``, by name."""
