"""Small bases and adapters on disk, made from numpy alone."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, LAYERS, VOCAB = 16, 4, 2, 24, 2, 32
BASE_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": LAYERS, "vocab_size": VOCAB, "torch_dtype": "bfloat16",
}  # fmt: skip
FEATURES = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, HIDDEN // 2),
    "v_proj": (HIDDEN, HIDDEN // 2),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, INTERMEDIATE),
    "up_proj": (HIDDEN, INTERMEDIATE),
    "down_proj": (INTERMEDIATE, HIDDEN),
}
ADAPTER_CONFIG: dict[str, Any] = {
    "base_model_name_or_path": "org/tiny", "bias": "none", "init_lora_weights": True, "lora_alpha": 8,
    "peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
}  # fmt: skip

Tensors = dict[str, np.ndarray[Any, Any]]


def key(layer: int, module: str, side: str, prefix: str = "base_model.model.model.") -> str:
    group = "mlp" if module in {"gate_proj", "up_proj", "down_proj"} else "self_attn"
    return f"{prefix}layers.{layer}.{group}.{module}.lora_{side}.weight"


def tensors(
    modules: tuple[str, ...] = ("q_proj", "v_proj"), rank: int = 4, layers: int = LAYERS, seed: int = 0
) -> Tensors:
    """Return random A and B of these modules in bfloat16."""
    random = np.random.default_rng(seed)
    made: Tensors = {}
    for layer in range(layers):
        for module in modules:
            features_in, features_out = FEATURES[module]
            a = random.normal(size=(rank, features_in))
            b = random.normal(size=(features_out, rank))
            made[key(layer, module, "A")] = a.astype(ml_dtypes.bfloat16)
            made[key(layer, module, "B")] = b.astype(ml_dtypes.bfloat16)
    return made


def write_adapter(folder: Path, values: Tensors | None = None, **config: Any) -> Path:
    """Write an adapter as PEFT does, from modules with tensors; config fields that are None are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    made = tensors() if values is None else values
    leaves = {name.split(".lora_")[0].rpartition(".")[2] for name in made}
    targets = sorted(leaves & FEATURES.keys()) or ["q_proj"]
    config = ADAPTER_CONFIG | {"target_modules": targets} | config
    fields = {name: value for name, value in config.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(made, folder / "adapter_model.safetensors")
    return folder


def write_base(folder: Path, **config: Any) -> Path:
    """Write a base: the builder reads its config, and only hashes its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(BASE_CONFIG | config))
    (folder / "tokenizer.json").write_text("{}")
    save_file(
        {"model.embed_tokens.weight": np.zeros((VOCAB, HIDDEN), np.float32)}, folder / "model.safetensors"
    )
    return folder
