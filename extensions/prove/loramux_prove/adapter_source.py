"""Adapters from their own files, as PEFT means them: written a second time on purpose.

The builder has its own reading of these files; a proof compares the two. Whatever is unusual was refused by
the builder before, so this is short.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from loramux_prove.disguised import products, scales, weight_of, without_initial
from loramux_prove.factors import ReferenceFactors, scale_of
from loramux_prove.vocabulary_source import OwnTable, read_own
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bundle.modules import BY_ID
from loramux_shared.faults import AdapterInvalid
from loramux_shared.untrusted_json import parse_json

# The modules of a linear of a checkpoint, in the order of its output rows.
_PARTS: Final = {
    "q_proj": ("attn_q",),
    "k_proj": ("attn_k",),
    "v_proj": ("attn_v",),
    "o_proj": ("attn_dense",),
    "gate_proj": ("mlp_h_to_4h",),
    "up_proj": ("mlp_gate",),
    "down_proj": ("mlp_4h_to_h",),
    "dense": ("attn_dense",),
    **dict.fromkeys(("fc1", "c_fc", "dense_h_to_4h"), ("mlp_h_to_4h",)),
    **dict.fromkeys(("fc2", "c_proj", "dense_4h_to_h"), ("mlp_4h_to_h",)),
    "query_key_value": ("attn_heads",),
    "qkv_proj": ("attn_q", "attn_k", "attn_v"),
    "gate_up_proj": ("mlp_h_to_4h", "mlp_gate"),
    "in_proj_qkv": ("delta_qkv",),
    "in_proj_z": ("delta_z",),
    "in_proj_b": ("delta_b",),
    "in_proj_a": ("delta_a",),
    "out_proj": ("delta_out",),
    "per_layer_input_gate": ("layer_input_gate",),
    "per_layer_projection": ("layer_input_projection",),
}
_KEY: Final = re.compile(
    r"(?!.*\.(?:visual|vision_|audio_))(?:base_model\.model\.)?"
    r"(?P<name>(?:.+\.)?layers\.(?P<layer>\d+)\.(?:\w+\.)?(?P<leaf>\w+))"
    r"(?:\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight"
    r"|\.lora_(?P<magnitude>magnitude_vector)(?:\.[^.]+){0,2}"
    r"|\.lora_B(?:\.[^.]+)?\.(?P<lora_bias>bias)"
    r"|(?:\.base_layer)?\.(?P<bias>bias))"
)
_NPY_FUSED: Final = {0: ("attn_q", "attn_k", "attn_v"), 18: ("mlp_gate", "mlp_h_to_4h")}


@dataclass(frozen=True)
class SourceAdapter:
    """An adapter as its files have it; by itself one that changes nothing."""

    layers: Mapping[tuple[int, str], ReferenceFactors] = field(default_factory=dict)
    """Factors by layer and the name of the module."""
    own: Mapping[str, OwnTable] = field(default_factory=dict)
    """Tables for embeddings and head, by the module's name."""


def read_adapter(
    folder: Path, base: ModelConfig, truncate_to: int | None = None, base_folder: Path | None = None
) -> SourceAdapter:
    """Read the files of an adapter that the builder accepted; some took a part of the base's weights."""
    if not (folder / "adapter_config.json").exists():
        return _cut(_read_npy(folder, base), {}, truncate_to)
    config = parse_json((folder / "adapter_config.json").read_bytes())
    files = sorted(folder.glob("adapter_model*.safetensors"))
    tensors = {
        _plain(key): tensor for key, tensor in chain.from_iterable(load_file(file).items() for file in files)
    }
    own = read_own(config, tensors, base)
    return _cut(_read_peft(config, tensors, base, base_folder), own, truncate_to)


def _cut(
    layers: Mapping[tuple[int, str], ReferenceFactors], own: Mapping[str, OwnTable], rank: int | None
) -> SourceAdapter:
    """Have all products cut to a rank, if there is one; what replaces rows of the base stays what it is."""
    return SourceAdapter(
        {place: replace(factors, cut=rank) for place, factors in layers.items()},
        {
            module: replace(table, cut=rank) if isinstance(table, ReferenceFactors) and table.plain else table
            for module, table in own.items()
        },
    )


def _read_peft(
    config: dict[str, Any], tensors: Mapping[str, Tensor], base: ModelConfig, base_folder: Path | None
) -> dict[tuple[int, str], ReferenceFactors]:
    if config["peft_type"] == "IA3":
        return _scaled(scales(tensors), base)
    if config["peft_type"] != "LORA":
        return _made(products(config, tensors, lambda name: _sizes(name, base)), base)
    sides: dict[tuple[int, str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            place = (int(match["layer"]), match["leaf"], match["name"])
            kinds = ("magnitude", "lora_bias", "bias")
            kind = match["side"] or next(kind for kind in kinds if match[kind])
            sides.setdefault(place, {})[kind] = tensor.float()
    found = _of_sides(sides, config, base)
    if (kind := config.get("init_lora_weights")) in ("pissa", "olora") and base_folder is not None:
        changed = {}
        for (*_, name), pair in sides.items():
            if "A" in pair:
                scale, weight = scale_of(config, name, len(pair["A"])), weight_of(base_folder, f"{name}.weight")
                changed[name] = without_initial(kind, weight, pair["A"], scale * pair["B"], scale)
        for at, made in _made(changed, base).items():
            found[at] = replace(found[at], a=made.a, b=made.b)
    return found


def _of_sides(
    sides: Mapping[tuple[int, str, str], dict[str, Tensor]], config: dict[str, Any], base: ModelConfig
) -> dict[tuple[int, str], ReferenceFactors]:
    """Return factors as they are in the file."""
    found = {}
    for (layer, leaf, name), own in sides.items():
        if leaf not in _PARTS:  # biases of norms and routers, which are the base's own
            continue
        inside = _features(base, _PARTS[leaf][0], layer)[0]
        a = own.get("A", torch.zeros(0, inside))
        scale = scale_of(config, name, len(a)) if len(a) else 1.0
        own = own | {"B": own["B"] * scale if "B" in own else torch.zeros(len(own["bias"]), 0)}
        if "lora_bias" in own:
            own["lora_bias"] = own["lora_bias"] * scale
        cut = {kind: dict(_split(_PARTS[leaf], layer, part, base)) for kind, part in own.items() if kind != "A"}
        for module in _PARTS[leaf]:
            b, magnitude, lora_bias, bias = (
                cut[kind][module] if kind in cut else None for kind in ("B", "magnitude", "lora_bias", "bias")
            )
            if b is not None:
                found[layer, module] = ReferenceFactors(a, b, magnitude, lora_bias, bias)
    return found


def _plain(key: str) -> str:
    plain = re.sub(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\b\.?", r"\1", key)
    return plain.removeprefix("module.")


def _made(
    pairs: Mapping[str, tuple[Tensor, Tensor]], base: ModelConfig
) -> dict[tuple[int, str], ReferenceFactors]:
    """Return A and B of modules by their names as factors."""
    found = {}
    for name, (a, b) in pairs.items():
        layer, leaf = _place(name)
        for module, rows in _split(_PARTS[leaf], layer, b.float(), base):
            found[layer, module] = ReferenceFactors(a.float(), rows)
    return found


def _scaled(own: Mapping[str, Tensor], base: ModelConfig) -> dict[tuple[int, str], ReferenceFactors]:
    """Return scales of outputs of modules by their names as factors."""
    found = {}
    for name, c in own.items():
        (layer, leaf), (inside, _) = _place(name), _sizes(name, base)
        for module, part in _split(_PARTS[leaf], layer, c, base):
            nothing = torch.zeros(0, inside), torch.zeros(len(part), 0)
            found[layer, module] = ReferenceFactors(*nothing, part, scales_bias=True, normalised=True)
    return found


def _sizes(name: str, base: ModelConfig) -> tuple[int, int]:
    """Return the inputs and the outputs of a linear of a checkpoint."""
    layer, leaf = _place(name)
    found = [_features(base, module, layer) for module in _PARTS[leaf]]
    return found[0][0], sum(out for _, out in found)


def _place(name: str) -> tuple[int, str]:
    layer, _, leaf = name.rpartition("layers.")[2].rsplit(".", 2)
    return int(layer), leaf


def _split(modules: tuple[str, ...], layer: int, b: Tensor, base: ModelConfig) -> list[tuple[str, Tensor]]:
    if len(modules) == 1:
        return [(modules[0], b)]
    sizes = [_features(base, module, layer)[1] for module in modules]
    return list(zip(modules, torch.split(b, sizes), strict=True))


def _read_npy(folder: Path, base: ModelConfig) -> dict[tuple[int, str], ReferenceFactors]:
    """Read what another TensorRT-LLM converter wrote: B is scaled already."""
    names = ("model.lora_config.npy", "model.lora_keys.npy")
    config = np.load(next(folder / name for name in names if (folder / name).exists()))
    weights = np.load(folder / "model.lora_weights.npy", mmap_mode="r")
    rows = weights.reshape(-1, weights.shape[-1])
    found = {}
    for row, (module_id, layer, rank, *rest) in zip(
        rows, config.reshape(-1, config.shape[-1]).tolist(), strict=True
    ):
        values = _floats(row)
        modules = _NPY_FUSED.get(module_id) or (BY_ID[module_id].name,)
        features = _features(base, modules[0], layer)[0]
        out = sum(_features(base, module, layer)[1] for module in modules)
        a = values[: rank * features].reshape(rank, features)
        end = rank * (features + out)
        b = values[rank * features : end].reshape(out, rank)
        magnitudes = dict(_split(modules, layer, values[end : end + out], base)) if any(rest) else {}
        for module, part in _split(modules, layer, b, base):
            found[layer, module] = ReferenceFactors(a, part, magnitudes.get(module), normalised=True)
    return found


def _features(base: ModelConfig, module: str, layer: int) -> tuple[int, int]:
    found = base.features(module, layer)
    if found is None:
        raise AdapterInvalid(f"layer {layer} of the base has no {module}")
    return found


def _floats(row: np.ndarray[Any, Any]) -> Tensor:
    """Return a row in float32; two-byte voids, and the type of ml_dtypes, are bfloat16."""
    if row.dtype.itemsize == 2 and row.dtype != np.float16:
        return torch.from_numpy(row.view(np.int16).copy()).view(torch.bfloat16).float()
    return torch.from_numpy(row.astype(np.float32))
