"""Adapters that are no plain LoRA, as A and B: a second reading, apart from the builder's."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor

_PART: Final = re.compile(
    r"base_model\.model\.(?P<name>.+)\."
    r"(?P<part>lora_[ABE]|vera_lambda_[bd]|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|miss_block)(?:\.[^.]+)?"
)

Parts: TypeAlias = Mapping[str, Tensor]
Product: TypeAlias = tuple[Tensor, Tensor]
"""A [rank, in] and B [out, rank], scale included, in float64."""


def products(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], features: Callable[[str], tuple[int, int]]
) -> dict[str, Product]:
    """Return what is added to the weight of each module.

    Args:
        config: of a kind that is not LORA.
        tensors: of the file.
        features: of a module's name, its inputs and outputs.
    """
    parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    shared: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if match := _PART.fullmatch(key):
            parts[match["name"]][match["part"]] = tensor.double()
        elif key.startswith("base_model.vera_"):
            shared[key.split(".")[1]] = tensor.double()
    kind = config["peft_type"]
    if kind == "VERA":
        return {name: _vera(own, shared, features(name)[0]) for name, own in parts.items()}
    if kind == "MISS":
        return {name: _miss(own, *features(name)) for name, own in parts.items()}
    if kind == "ADALORA":
        alpha = 8.0 if config.get("lora_alpha") is None else float(config["lora_alpha"])
        first = config.get("init_r", 12) + 1e-5
        ranked = {name: own for name, own in parts.items() if len(own["lora_E"])}
        made = {name: own["lora_A"] * own["lora_E"] for name, own in ranked.items()}
        scaled = {name: (alpha if alpha > 0 else len(a)) / first for name, a in made.items()}
        return {name: (a, scaled[name] * ranked[name]["lora_B"]) for name, a in made.items()}
    compute = _loha if kind == "LOHA" else _lokr
    found = {}
    for name, own in parts.items():
        a, b = compute(own)
        found[name] = a, _lycoris_scale(config, name) * b
    return found


def scales(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return IA3's scales of outputs [out] by the names of modules; down_proj reads up_proj's."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.").partition(".ia3_l")[0]
        of = f"{name.rpartition('.')[0]}.up_proj" if len(tensor) == 1 else name
        found[of] = tensor.float().flatten() * found.get(of, torch.ones(()))
    return found


def without_initial(kind: str, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Product:
    """Return A and B, which has its scale, less what PiSSA or OLoRA took out of a weight [out, in]."""
    rank, w = len(a), weight.double()
    if kind == "pissa":
        u, values, v = torch.linalg.svd(w, full_matrices=False)
        first, second = v[:rank], u[:, :rank] * values[:rank]
    else:
        q, r = torch.linalg.qr(w)
        first, second = r[:rank], scale * q[:, :rank]
    return torch.cat([a.double(), first]), torch.cat([b.double(), -second], dim=1)


def weight_of(folder: Path, name: str) -> Tensor:
    """Return a tensor of the base."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 - it has no other way to ask
                found: Tensor = file.get_tensor(name)
                return found
    raise KeyError(name)


def _vera(own: Parts, shared: Parts, width: int) -> Product:
    out = len(own["vera_lambda_b"])
    a = own["vera_lambda_d"][:, None] * shared["vera_A"][:, :width]
    return a, own["vera_lambda_b"][:, None] * shared["vera_B"][:out]


def _miss(own: Parts, inside: int, out: int) -> Product:
    """Return a sum of every r-th input, and the block: its columns repeat where outputs are more."""
    rank, columns = own["miss_block"].shape
    a = (torch.arange(inside) % rank == torch.arange(rank)[:, None]).double()
    return a, own["miss_block"].T.repeat(out // columns, 1)


def _loha(own: Parts) -> Product:
    a = torch.einsum("ri,si->rsi", own["hada_w1_b"], own["hada_w2_b"]).flatten(0, 1)
    return a, torch.einsum("or,os->ors", own["hada_w1_a"], own["hada_w2_a"]).flatten(1)


def _lokr(own: Parts) -> Product:
    (a1, b1), (a2, b2) = (_factor(own, name) for name in ("lokr_w1", "lokr_w2"))
    return torch.kron(a1, a2), torch.kron(b1, b2)


def _factor(own: Parts, name: str) -> Product:
    if name not in own:
        return own[f"{name}_b"], own[f"{name}_a"]
    out, inside = own[name].shape
    one = torch.eye(min(out, inside), dtype=torch.float64)
    return (own[name], one) if out < inside else (one, own[name])


def _lycoris_scale(config: Mapping[str, Any], name: str) -> float:
    values = []
    for field, default in (("alpha", 8), ("r", 8)):
        value = default if config.get(field) is None else config[field]
        patterns = config.get(f"{'rank' if field == 'r' else field}_pattern") or {}
        matching = (each for pattern, each in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
        values.append(float(next(matching, value)))
    return values[0] / values[1]
