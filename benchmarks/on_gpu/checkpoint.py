"""A random base and random adapters on disk, and the deployment that is built of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from benchmarks.on_gpu.model import SCALE, config_fields, config_of
from builder_service.pipeline.build import build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from loramux_shared.bundle.modules import BaseDims
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.open import open_store

MODULES: Final = {
    "self_attn.q_proj": ("hidden", "q"),
    "self_attn.k_proj": ("hidden", "kv"),
    "self_attn.v_proj": ("hidden", "kv"),
    "self_attn.o_proj": ("q", "hidden"),
    "mlp.gate_proj": ("hidden", "inter"),
    "mlp.up_proj": ("hidden", "inter"),
    "mlp.down_proj": ("inter", "hidden"),
}
"""Projections with their inner and outer widths."""
SPECIAL: Final = ("<s>", "</s>", "<unk>")


def write_base(folder: Path, shape: dict[str, Any], device: torch.device, words: Sequence[str] = ()) -> None:
    """Write a checkpoint in bfloat16 whose head is its embedding, with a tokenizer of a token per word."""
    folder.mkdir(parents=True)
    fields = config_fields(shape)
    dims = config_of(shape).dims
    (folder / "config.json").write_text(json.dumps(fields))
    widths = _widths(dims)
    tensors = {"model.embed_tokens.weight": _draw((dims.vocab, dims.hidden), device)}
    tensors["model.norm.weight"] = torch.ones(dims.hidden, dtype=torch.bfloat16)
    for layer in range(dims.num_layers):
        at = f"model.layers.{layer}"
        for module, (inside, outside) in MODULES.items():
            tensors[f"{at}.{module}.weight"] = _draw((widths[outside], widths[inside]), device)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = torch.ones(dims.hidden, dtype=torch.bfloat16)
        for norm in ("q_norm", "k_norm") if fields["model_type"] == "qwen3" else ():
            tensors[f"{at}.self_attn.{norm}.weight"] = torch.ones(dims.head_dim, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder / "tokenizer.json", dims.vocab, words)


def write_adapter(folder: Path, shape: dict[str, Any], rank: int, device: torch.device) -> None:
    """Write an adapter of all projections as PEFT does."""
    folder.mkdir(parents=True)
    dims = config_of(shape).dims
    widths, tensors = _widths(dims), {}
    for layer in range(dims.num_layers):
        for module, (inside, outside) in MODULES.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{key}.lora_A.weight"] = _draw((rank, widths[inside]), device)
            tensors[f"{key}.lora_B.weight"] = _draw((widths[outside], rank), device)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
    config |= {"target_modules": [module.split(".")[1] for module in MODULES]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "random"}))


def build_deployment(
    work: Path, name: str, adapters: list[str], max_seq_len: int, base: Path | None = None, store: str = ""
) -> None:
    """Build some of ``work/adapters`` as the builder does; by default of ``work/base``, into ``work/store``."""
    base = base or work / "base"
    data = {
        "model_name": name,
        "build": {
            "max_seq_len": max_seq_len,
            "checkpoint_repository": {"source": "LOCAL", "repo": str(base)},
            "lora_adapters": {
                each: {"source": "LOCAL", "repo": str(work / "adapters" / each)} for each in adapters
            },
        },
        "runtime": {"served_model_name": "base"},
    }
    context = BuildContext(open_store(store or f"file://{work}/store"), open_sources(local_roots=[work, base]))
    build(parse_deployment(data).deployment, context, Progress(adapters))


def _widths(dims: BaseDims) -> dict[str, int]:
    q, kv = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    return {"hidden": dims.hidden, "q": q, "kv": kv, "inter": dims.intermediate}


def _draw(shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(SCALE).cpu()


def write_tokenizer(path: Path, vocab: int, words: Sequence[str] = ()) -> None:
    """A token per word, and made-up words up to the size of the vocabulary."""
    words = [*SPECIAL, *words]
    words += [f"w{index}" for index in range(len(words), vocab)]
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))  # noqa: S106 - a token of text
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##")  # words with spaces between
    tokenizer.save(str(path))
