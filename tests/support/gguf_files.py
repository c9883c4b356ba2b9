"""Small files of GGUF, and the checkpoints that they mean."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

from loramux_shared.gguf.files import AROUND, OF_LAYER

HALVES = {
    "Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208], "Q4_0": [0], "Q5_0": [0], "Q8_0": [0], "IQ4_NL": [0],
    "IQ4_XS": [0],
}  # fmt: skip
"""Places of float16 in blocks: one for the scale, and in other types one more for the offset."""
WIDTHS = {"Q2_K": 0.05, "IQ4_NL": 2e-4, "IQ4_XS": 1e-5}
"""Deviations of scales, where they do not follow from the bits."""
NAMES = {own: theirs for theirs, own in (OF_LAYER | AROUND).items()}
HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def random_blocks(kind: str, rows: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return the bytes [rows, bytes] of rows of random blocks, whose weights are small."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    draw = np.random.default_rng(seed)
    data = draw.integers(0, 256, (rows, width // values, size), dtype=np.uint8)
    for at in HALVES.get(kind, [0, 2]):
        halves = draw.normal(
            0,
            WIDTHS.get(kind, 2.0 / 4 ** int(kind.lstrip("IQ")[0])) / (32 if "K" in kind else 1),
            data.shape[:2],
        )
        data[:, :, at : at + 2] = halves.astype(np.float16)[..., None].view(np.uint8)
    return data.reshape(rows, -1)


def write_gguf(
    path: Path,
    checkpoint: Path,
    config: Mapping[str, Any],
    kinds: Callable[[str], str],
    fields: Mapping[str, Any] | None = None,
    **options: int,
) -> None:
    """Write a GGUF of random matrices, and put these into the checkpoint; ``kinds`` are types by name."""
    arch = config["model_type"]
    writer = gguf.GGUFWriter(path, arch, **options)
    sizes = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
    }
    if config.get("head_dim"):
        sizes |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    for key, size in sizes.items():
        writer.add_uint32(f"{arch}.{key}", size)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_float32(f"{arch}.rope.freq_base", config.get("rope_theta") or 10000.0)
    add_tokenizer(writer, config["vocab_size"])
    for key, value in (fields or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    weights = load_file(checkpoint / "model.safetensors")
    for seed, (name, weight) in enumerate(weights.items()):
        own, _, last = name.removeprefix("model.").rpartition(".")
        stem = NAMES.get(f"model.{own}") or NAMES.get(own) or ""
        if own.startswith("layers."):
            _, layer, part = own.split(".", 2)
            stem = f"blk.{layer}.{NAMES[part]}"
        kind = kinds(stem) if weight.ndim == 2 else "F32"
        qtype = gguf.GGMLQuantizationType[kind]
        data = weight.astype(np.float32)
        if kind not in ("F32", "F16"):
            data = random_blocks(kind, weight.shape[0], weight.shape[1], seed)
            weights[name] = gguf.dequantize(data, qtype)
        elif kind == "F16":
            data = weight.astype(np.float16)
            weights[name] = data.astype(np.float32)
        heads = HEADS.get(stem.rpartition(".")[2]) if arch in ("llama", "granite", "smollm3") else None
        if heads is not None:  # as llama.cpp's converter permutes them
            shape = data.shape
            data = data.reshape(config[heads], 2, -1, *shape[1:]).swapaxes(1, 2).reshape(shape)
        writer.add_tensor(f"{stem}.{last}", np.ascontiguousarray(data), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def add_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    """Give a file the tokens of single bytes, one of two, and enough of others."""
    tokens = [*sorted(ByteLevel.alphabet()), "he"]
    tokens += [f"<|{number}|>" for number in range(len(tokens), vocab)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens[:vocab])
    writer.add_token_types([1 if len(token) < 3 else 3 for token in tokens[:vocab]])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(vocab - 2)
    writer.add_eos_token_id(vocab - 1)
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")


PARTS = NAMES | {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
WRITTEN: Mapping[str, Any] = {
    "general.type": "adapter", "adapter.type": "lora", "general.base_model.0.repo_url": "https://huggingface.co/org/base",
}  # fmt: skip


def write_adapter(
    path: Path,
    folder: Path,
    config: Mapping[str, Any],
    kind: str = "F32",
    fields: Mapping[str, Any] = WRITTEN,
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Write a folder of PEFT as llama.cpp's convert_lora_to_gguf.py does, and its values back as they are read.

    ``config`` is that of the base; ``renamed`` are other names of tensors.
    """
    arch, qtype = config["model_type"].removesuffix("_text"), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama" if arch == "mistral" else arch)
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    for key, value in ({"adapter.lora.alpha": float(alpha)} | fields).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value), gguf.GGUFValueType.UINT32)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, values in tensors.items():
        if ".lora_" not in name:  # a copy of the base's embeddings
            continue
        module, _, last = name.removeprefix("base_model.model.").partition(".lora_")
        side = "a" if "A" in last else "b"
        stem = NAMES.get(module, "")
        if ".layers." in module:
            _, _, layer, part = module.split(".", 3)
            stem = f"blk.{layer}.{PARTS[part]}"
        whole = values.shape[1] % gguf.GGML_QUANT_SIZES[qtype][0] == 0
        own = qtype if whole else gguf.GGMLQuantizationType.F16
        data = gguf.quantize(values, own)
        tensors[name] = gguf.dequantize(data, own)
        heads = HEADS.get(stem.rpartition(".")[2])
        if heads and side == "b" and arch in ("llama", "mistral", "granite", "smollm3"):
            data = data.reshape(config[heads], 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        if stem == "token_embd" and side == "a":
            data = gguf.quantize(np.ascontiguousarray(tensors[name].T), own := gguf.GGMLQuantizationType.F32)
        written = f"{stem}.weight.lora_{side}"
        written = (renamed or {}).get(written, written)
        writer.add_tensor(written, np.ascontiguousarray(data), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
