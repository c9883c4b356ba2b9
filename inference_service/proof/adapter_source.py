"""Adapters from their own files, as PEFT means them: written a second time on purpose.

The builder has its own reading of these files; a proof compares the two. Whatever is unusual was refused by
the builder before, so this is short.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from inference_service.proof.disguised import products, scales, weight_of, without_initial
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bundle.modules import BY_ID
from loramux_shared.faults import AdapterInvalid

# What a leaf of a checkpoint adapts, in the order of its output rows.
_PARTS: Final = {
    "q_proj": ("attn_q",),
    "k_proj": ("attn_k",),
    "v_proj": ("attn_v",),
    "o_proj": ("attn_dense",),
    "gate_proj": ("mlp_h_to_4h",),
    "up_proj": ("mlp_gate",),
    "down_proj": ("mlp_4h_to_h",),
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


@dataclass
class Factors:
    """What becomes of the output of one module of one layer; everything is float32.

    ``W x + bias`` becomes ``c * (W x + x Aᵀ Bᵀ) + bias + lora_bias``, where c are magnitudes over the norms of
    the rows of W + BA, or 1.
    """

    a: Tensor
    """[rank, in]"""
    b: Tensor
    """[out, rank], scale included."""
    magnitude: Tensor | None = None
    """[out]"""
    lora_bias: Tensor | None = None
    """[out], scale included."""
    bias: Tensor | None = None
    """[out]: in the place of the base's."""
    scales_bias: bool = False
    """Whether magnitudes multiply the base's bias too, as IA3's do."""
    normalised: bool = False
    """Whether magnitudes are divided by the norms already."""
    cut: int | None = None
    """The rank to which the product is cut; norms are those of all of it."""
    _c: Tensor | None = None

    @cached_property
    def product(self) -> tuple[Tensor, Tensor]:
        """A and B as they are multiplied with."""
        return _truncated(self.a, self.b, self.cut)

    def added(self, x: Tensor) -> Tensor:
        """Return what A and B make of x [T, in], [T, out]."""
        a, b = self.product
        return x @ a.T @ b.T

    @property
    def plain(self) -> bool:
        """Whether there is nothing but A and B."""
        return self.magnitude is None and self.lora_bias is None and self.bias is None

    def changed(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what becomes of y = W x, for a module with a weight [out, in] and a bias [out]."""
        y = y + self.added(x)
        if self.magnitude is not None:
            if self._c is None:
                norms = 1.0 if self.normalised else (weight + self.b @ self.a).norm(dim=1)
                self._c = self.magnitude / norms
            if self.scales_bias and bias is not None:
                return self._c * (y + bias)
            y = self._c * y
        for added in (bias if self.bias is None else self.bias, self.lora_bias):
            y = y if added is None else y + added
        return y


AdapterFactors = Mapping[tuple[int, str], Factors]
"""By layer and the name of the module."""


def read_adapter(
    folder: Path, base: ModelConfig, truncate_to: int | None = None, base_folder: Path | None = None
) -> AdapterFactors:
    """Read the files of an adapter that the builder accepted; some took a part of the base's weights."""
    peft = (folder / "adapter_config.json").exists()
    found = _read_peft(folder, base, base_folder) if peft else _read_npy(folder, base)
    if truncate_to is None:
        return found
    return {place: replace(factors, cut=truncate_to) for place, factors in found.items()}


def _read_peft(folder: Path, base: ModelConfig, base_folder: Path | None) -> dict[tuple[int, str], Factors]:
    config = json.loads((folder / "adapter_config.json").read_bytes())
    files = sorted(folder.glob("adapter_model*.safetensors"))
    tensors = {
        _plain(key): tensor for key, tensor in chain.from_iterable(load_file(file).items() for file in files)
    }
    if config["peft_type"] == "IA3":
        return _scaled(scales(tensors), base)
    if config["peft_type"] != "LORA":
        return _made(products(config, tensors, lambda name: _width(name, base)), base)
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
                scale, weight = _scale(config, name, len(pair["A"])), weight_of(base_folder, f"{name}.weight")
                changed[name] = without_initial(kind, weight, pair["A"], scale * pair["B"], scale)
        for at, made in _made(changed, base).items():
            found[at] = replace(found[at], a=made.a, b=made.b)
    return found


def _of_sides(
    sides: Mapping[tuple[int, str, str], dict[str, Tensor]], config: dict[str, Any], base: ModelConfig
) -> dict[tuple[int, str], Factors]:
    """Return factors as they are in the file."""
    found = {}
    for (layer, leaf, name), own in sides.items():
        if leaf not in _PARTS:  # biases of norms and routers, which are the base's own
            continue
        inside = _features(base, _PARTS[leaf][0], layer)[0]
        a = own.get("A", torch.zeros(0, inside))
        scale = _scale(config, name, len(a)) if len(a) else 1.0
        own = own | {"B": own["B"] * scale if "B" in own else torch.zeros(len(own["bias"]), 0)}
        if "lora_bias" in own:
            own["lora_bias"] = own["lora_bias"] * scale
        cut = {kind: dict(_split(_PARTS[leaf], layer, part, base)) for kind, part in own.items() if kind != "A"}
        for module in _PARTS[leaf]:
            b, magnitude, lora_bias, bias = (
                cut[kind][module] if kind in cut else None for kind in ("B", "magnitude", "lora_bias", "bias")
            )
            if b is not None:
                found[layer, module] = Factors(a, b, magnitude, lora_bias, bias)
    return found


def _plain(key: str) -> str:
    plain = re.sub(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\b\.?", r"\1", key)
    return plain.removeprefix("module.")


def _made(pairs: Mapping[str, tuple[Tensor, Tensor]], base: ModelConfig) -> dict[tuple[int, str], Factors]:
    """Return A and B of modules by their names as factors."""
    found = {}
    for name, (a, b) in pairs.items():
        layer, leaf = _place(name)
        for module, rows in _split(_PARTS[leaf], layer, b.float(), base):
            found[layer, module] = Factors(a.float(), rows)
    return found


def _scaled(own: Mapping[str, Tensor], base: ModelConfig) -> dict[tuple[int, str], Factors]:
    """Return scales of outputs of modules by their names as factors."""
    found = {}
    for name, c in own.items():
        (layer, leaf), inside = _place(name), _width(name, base)
        for module, part in _split(_PARTS[leaf], layer, c, base):
            nothing = torch.zeros(0, inside), torch.zeros(len(part), 0)
            found[layer, module] = Factors(*nothing, part, scales_bias=True, normalised=True)
    return found


def _width(name: str, base: ModelConfig) -> int:
    layer, leaf = _place(name)
    return _features(base, _PARTS[leaf][0], layer)[0]


def _place(name: str) -> tuple[int, str]:
    layer, _, leaf = name.rpartition("layers.")[2].rsplit(".", 2)
    return int(layer), leaf


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    alpha = config.get("lora_alpha")
    alpha = 8.0 if alpha is None else float(alpha)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = float(value)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _split(modules: tuple[str, ...], layer: int, b: Tensor, base: ModelConfig) -> list[tuple[str, Tensor]]:
    if len(modules) == 1:
        return [(modules[0], b)]
    sizes = [_features(base, module, layer)[1] for module in modules]
    return list(zip(modules, torch.split(b, sizes), strict=True))


def _read_npy(folder: Path, base: ModelConfig) -> dict[tuple[int, str], Factors]:
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
            found[layer, module] = Factors(a, part, magnitudes.get(module), normalised=True)
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


def _truncated(a: Tensor, b: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """The best approximation of the product, by torch."""
    if rank is None or len(a) <= rank:
        return a, b
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, values, vt = torch.linalg.svd(r_b @ r_a.T)
    a, b = vt[:rank] @ q_a.T, q_b @ (u[:, :rank] * values[:rank])
    return a.float(), b.float()
