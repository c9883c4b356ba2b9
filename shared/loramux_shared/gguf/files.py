"""A GGUF file as a checkpoint: the small files that follow from its metadata, beside a link to it."""

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from loramux_shared.adapter_files import ADAPTER_GGUF
from loramux_shared.bases.files import GGUF, GGUF_SUFFIX
from loramux_shared.bundle.manifest import sha256_hex
from loramux_shared.gguf.header import (
    FREQUENCIES,
    IN_MEMORY,
    SIZES,
    WHOLE,
    GgufHeader,
    TensorPlace,
    files_of,
    read_model,
)
from loramux_shared.gguf.tokenizer import tokenizer_json

OF_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of a layer's tensors in a checkpoint, by GGUF's."""
AROUND: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


class GgufArchitecture(NamedTuple):
    """An architecture of GGUF that is served."""

    name: str
    """The class of transformers."""
    turned: bool
    """True if the rows of queries and keys lie in pairs that are rotated together."""


ARCHITECTURES: Final = {
    "llama": GgufArchitecture("LlamaForCausalLM", turned=True),
    "qwen2": GgufArchitecture("Qwen2ForCausalLM", turned=False),
    "qwen3": GgufArchitecture("Qwen3ForCausalLM", turned=False),
    "granite": GgufArchitecture("GraniteForCausalLM", turned=True),
    "smollm3": GgufArchitecture("SmolLM3ForCausalLM", turned=True),
}
GRANITE: Final = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
"""Factors in a config, by GGUF's names."""


def as_checkpoint(path: Path, below: Path) -> Path:
    """Return a folder with links to the files of a model, or to an adapter, and the small files that follow.

    It is made once, below a folder; another state of the files has another one.

    Raises:
        CheckpointInvalid: a file is not one that is served.
        OSError: it cannot be read, or the folder not be written.
    """
    parts = files_of(path)
    states = [(part.resolve(), part.stat()) for part in parts]
    state = "\n".join(f"{at}\n{its.st_size}\n{its.st_mtime_ns}\n{its.st_ino}" for at, its in states)
    folder = below / sha256_hex(state.encode())[:24]
    if not folder.is_dir():
        header = read_model(path)
        of_adapter = is_adapter(header)
        files = {} if of_adapter else small_files(header)
        below.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".", dir=below))
        try:
            for name, content in files.items():
                (made / name).write_text(content, encoding="utf-8")
            names = link_names(len(parts), of_adapter=of_adapter)
            for name, (at, _) in zip(names, states, strict=True):
                (made / name).symlink_to(at)
            made.rename(folder)
        except OSError:
            shutil.rmtree(made, ignore_errors=True)
            if not folder.is_dir():  # another process made it meanwhile
                raise
    return folder


def link_names(count: int, *, of_adapter: bool = False) -> list[str]:
    """Return the names of so many files of GGUF in a checkpoint, or of the one of an adapter."""
    if count == 1:
        return [ADAPTER_GGUF if of_adapter else GGUF]
    return [f"model-{number:05d}-of-{count:05d}{GGUF_SUFFIX}" for number in range(1, count + 1)]


def small_files(header: GgufHeader) -> dict[str, str]:
    """Return the contents of a checkpoint's small files.

    Raises:
        CheckpointInvalid: the model is not one that is served.
    """
    config = config_json(header)
    tokens = header.array("tokenizer.ggml.tokens", str)
    if len(tokens) != config["vocab_size"]:
        raise header.invalid(
            f"{len(tokens)} tokens, and embeddings of {config['vocab_size']}: they contradict each other."
        )
    special = {
        f"{use}_token": tokens[number]
        for use, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if (number := _token(header, key, len(tokens))) is not None
    }
    ends = {_token(header, key, len(tokens)) for key in ("eos", "eot", "eom")} - {None}
    about = {
        "model_max_length": config["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files = {
        "config.json": _json(config),
        "generation_config.json": _json({"eos_token_id": sorted(ends)} if ends else {}),
        "tokenizer.json": _json(tokenizer_json(header)),
        "tokenizer_config.json": _json(special | about),
    }
    if template := header.text("tokenizer.chat_template"):
        files["chat_template.jinja"] = template
    if licence := header.text("general.license"):
        files["README.md"] = f"---\nlicense: {json.dumps(licence)}\n---\n"
    return files


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, indent=1)


def _token(header: GgufHeader, use: str, count: int) -> int | None:
    number = header.fields.get(f"tokenizer.ggml.{use}_token_id")
    if number is not None and not (type(number) is int and 0 <= number < count):
        raise header.invalid(
            f"tokenizer.ggml.{use}_token_id: expected one of {count} tokens, found {number!r:.80}."
        )
    return number


def is_adapter(header: GgufHeader) -> bool:
    """Return True if a file is an adapter, and no model."""
    return header.text("general.type", "model") == "adapter"


def architecture_of(header: GgufHeader) -> GgufArchitecture:
    """Return the architecture of a file.

    Raises:
        CheckpointInvalid: it is not served.
    """
    name = header.text("general.architecture")
    if is_adapter(header):
        raise header.invalid("it is an adapter of llama.cpp, expected a model. Name it as an adapter.")
    if name not in ARCHITECTURES:
        raise header.invalid(
            f"the architecture {name!r:.80} is not supported in GGUF; supported: {', '.join(ARCHITECTURES)}. "
            "Serve the model's checkpoint in safetensors."
        )
    return ARCHITECTURES[name]


def checkpoint_name(header: GgufHeader, name: str, place: TensorPlace) -> str:
    """Return a tensor's name in a checkpoint; that of one of blocks ends with their type.

    Raises:
        CheckpointInvalid: no architecture that is served has it.
    """
    stem, _, last = name.rpartition(".")
    found = AROUND.get(stem)
    if stem.startswith("blk."):
        _, layer, part = (*stem.split(".", 2), "")[:3]
        found = f"model.layers.{layer}.{OF_LAYER[part]}" if part in OF_LAYER else None
    if found is None or last not in ("weight", "bias"):
        raise header.invalid(f"the tensor {name} is none of {header.text('general.architecture'):.80}.")
    return f"{found}.{last}" if place.type in WHOLE else f"{found}.{last}.{place.type}"


def rows_of_head(header: GgufHeader, name: str) -> int | None:
    """Return the rows of a head whose rotated pairs are neighbours in the file; None for all other tensors.

    Raises:
        CheckpointInvalid: the rows are not those of the heads.
    """
    part = name.rpartition(".")[0].rpartition(".")[2]
    if part not in ("attn_q", "attn_k") or not architecture_of(header).turned:
        return None
    arch, rows = header.text("general.architecture"), header.tensors[name].shape[0]
    heads = header.integer(f"{arch}.attention.head_count")
    if part == "attn_k":
        heads = header.integer(f"{arch}.attention.head_count_kv", heads)
    if heads < 1 or rows % (2 * heads):
        raise header.invalid(f"{name}: {rows} rows are not those of {heads} heads.")
    return rows // heads


def config_of(path: Path) -> dict[str, Any]:
    """Return the content of ``config.json`` of a file.

    Raises:
        CheckpointInvalid: the model is not one that is served.
        OSError: it cannot be read.
    """
    return config_json(read_model(path))


def config_json(header: GgufHeader) -> dict[str, Any]:
    """Return the content of ``config.json``.

    Raises:
        CheckpointInvalid: the model is not one that is served.
    """
    architecture, name = architecture_of(header), header.text("general.architecture")

    def of(key: str, default: int | None = None) -> int:
        return header.integer(f"{name}.{key}", default)

    hidden, heads = of("embedding_length"), of("attention.head_count")
    head_dim = of("attention.key_length", hidden // max(1, heads))
    for key, expected in {
        "expert_count": 0, "attention.value_length": head_dim, "rope.dimension_count": head_dim,
    }.items():  # fmt: skip
        if of(key, expected) != expected:
            raise header.invalid(f"{name}.{key} is {of(key)}, expected {expected}: such a model is not served.")
    shape = header.tensors["token_embd.weight"].shape if "token_embd.weight" in header.tensors else ()
    if len(shape) != 2:
        raise header.invalid("token_embd.weight: expected the embeddings, found none.")
    kinds = dict.fromkeys(place.type for place in header.tensors.values() if place.type not in WHOLE)
    config = {
        "architectures": [architecture.name],
        "model_type": name,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "num_hidden_layers": of("block_count"),
        "intermediate_size": of("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": header.number(f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_theta": header.number(f"{name}.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(header, name, head_dim),
        "max_position_embeddings": of("context_length"),
        "vocab_size": shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "torch_dtype": "bfloat16",
    }
    if name == "granite":
        config |= {field: header.number(f"{name}.{key}", 1.0) for field, key in GRANITE.items()}
    if architecture.turned:
        config["attention_bias"] = "blk.0.attn_output.bias" in header.tensors
        config["mlp_bias"] = "blk.0.ffn_down.bias" in header.tensors
    if kinds:
        config["quantization_config"] = {
            "quant_method": "gguf",
            "types": sorted(kinds),
            "bytes": _bytes(header),
        }
    return config


def _bytes(header: GgufHeader) -> dict[str, int]:
    """Return what tensors of blocks take in memory."""
    sizes = {"tables": 0, "linears": 0}
    for name, place in header.tensors.items():
        if place.type not in WHOLE:
            _, size = SIZES[place.type]
            in_memory = place.num_bytes // size * IN_MEMORY.get(place.type, size)
            sizes["linears" if name.startswith("blk.") else "tables"] += in_memory
    return sizes


def _rope_scaling(header: GgufHeader, name: str, head_dim: int) -> dict[str, Any] | None:
    """Return how positions are scaled."""
    kind = header.text(f"{name}.rope.scaling.type", "none")
    if FREQUENCIES in header.tensors:
        return _llama3(header, header.number(f"{name}.rope.freq_base", 10000.0), head_dim)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise header.invalid(
            f"{name}.rope.scaling.type: {kind!r:.80} is not supported; supported: linear, yarn."
        )
    scaling: dict[str, Any] = {"rope_type": kind, "factor": header.number(f"{name}.rope.scaling.factor")}
    original = f"{name}.rope.scaling.original_context_length"
    if original in header.fields:
        scaling["original_max_position_embeddings"] = header.integer(original)
    return scaling


LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The scaling of all releases of Llama 3.1 and later, whose files keep the factors alone."""
CLOSE: Final = 1e-3


def _llama3(header: GgufHeader, base: float, head_dim: int) -> dict[str, Any]:
    """Return the scaling that a file's factors of frequencies follow from.

    Raises:
        CheckpointInvalid: they follow from another one.
    """
    if (
        len(header.factors) != head_dim // 2
        or not all(0 < each < math.inf for each in header.factors)
        or base < 1
    ):
        raise header.invalid(f"{FREQUENCIES}: expected {head_dim // 2} factors, and a base of frequencies.")
    factor = float(f"{max(header.factors, default=1.0):.5g}")
    low, high, original = LLAMA3.values()
    expected = []
    for place in range(head_dim // 2):
        turns = original * base ** (-2 * place / head_dim) / (2 * math.pi)
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        expected.append(1 / ((1 - smooth) / factor + smooth))
    if any(abs(a - b) > CLOSE * a for a, b in zip(expected, header.factors, strict=True)):
        raise header.invalid(f"{FREQUENCIES}: expected the factors of Llama 3.1, found others.")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}
