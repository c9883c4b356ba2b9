"""What a decoder looks like, from a checkpoint's ``config.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference_service.core.groups import GroupShape, layer_groups
from inference_service.layers.rope import RopeScaling
from shared.bundle.modules import BaseDims
from shared.faults import CheckpointInvalid

ARCHITECTURES = ("LlamaForCausalLM",)
ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-like decoder."""

    architecture: str
    dims: BaseDims
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    max_positions: int
    """The longest sequence that the model was made for."""
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str
    """Of the checkpoint: ``bfloat16``, ``float16`` or ``float32``."""
    eos_token_ids: frozenset[int]

    @property
    def groups(self) -> tuple[GroupShape, ...]:
        """The fused linears of a layer."""
        dims = self.dims
        q, kv = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
        return layer_groups(dims.hidden, dims.intermediate, q, kv)


def read_config(folder: Path) -> ModelConfig:
    """Read ``config.json`` and the end-of-sequence tokens of ``generation_config.json``.

    Raises:
        CheckpointInvalid: no such file, or a model that is not supported, with what is.
    """
    config = _read_json(folder / "config.json")
    if config is None:
        raise CheckpointInvalid("the base checkpoint has no config.json; expected a Hugging Face checkpoint.")
    architecture = (config.get("architectures") or ["unknown"])[0]
    if architecture not in ARCHITECTURES:
        raise CheckpointInvalid(
            f"config.json: architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}."
        )
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointInvalid(
            f"config.json: hidden_act {config['hidden_act']!r} is not supported; supported: silu."
        )
    theta, scaling = _rope(config)
    generation = _read_json(folder / "generation_config.json") or {}
    return ModelConfig(
        architecture=architecture,
        dims=BaseDims.from_config(config),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=int(config.get("max_position_embeddings", 2048)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        eos_token_ids=_ids(config.get("eos_token_id")) | _ids(generation.get("eos_token_id")),
    )


def _rope(config: dict[str, Any]) -> tuple[float, RopeScaling]:
    """Read rope from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    block = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = block.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = block.get("rope_type") or block.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise CheckpointInvalid(
            f"config.json: rope scaling {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}."
        )
    if config.get("partial_rotary_factor", block.get("partial_rotary_factor", 1.0)) != 1.0:
        raise CheckpointInvalid("config.json: partial_rotary_factor other than 1 is not supported.")
    return float(theta), RopeScaling(
        kind=kind,
        factor=float(block.get("factor", 1.0)),
        low_freq_factor=float(block.get("low_freq_factor", 1.0)),
        high_freq_factor=float(block.get("high_freq_factor", 4.0)),
        original_max_position=int(block.get("original_max_position_embeddings", 8192)),
    )


def _ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, list) else frozenset([value])


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointInvalid(f"{path.name} is not valid JSON.") from error
    if not isinstance(data, dict):
        raise CheckpointInvalid(f"{path.name}: expected an object, found {type(data).__name__}.")
    return data
