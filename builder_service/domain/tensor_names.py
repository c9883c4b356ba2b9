"""From the key of a tensor to a module of a layer, by a whitelist; what is not on it is refused by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from shared.bundle.modules import BY_HF, Module

# Names that wrappers of the trained model leave in the keys, wherever they stand.
_WRAPPERS: Final = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_ROOT: Final = "base_model.model."
# The text decoder's layers in the base's own names: causal LMs, vision-language models before and after
# transformers 4.52, bare models.
_DECODERS: Final = (
    "model.",
    "model.language_model.",
    "language_model.model.",
    "model.language_model.model.",
    "",
)
_GROUPS: Final = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
_LORA: Final = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<infix>[^.]+))?\.weight")
_PLACE: Final = re.compile(
    r"(?P<decoder>(?:[^.]+\.)*?)layers\.(?P<layer>[0-9]{1,6})\.(?P<path>[^.]+(?:\.[^.]+)*)"
)

# Kinds of keys that are refused with a reason of their own, in the order in which they are tried.
_KNOWN_REFUSALS: Final = (
    ("E_MLX", re.compile(r"\.lora_[ab](\.|$)")),
    ("E_EMBED", re.compile(r"lora_embedding_|trainable_tokens|modules_to_save|original_module")),
    ("E_EMBED", re.compile(r"(^|\.)(embed_tokens|lm_head|wte|embed_out)\.")),
    ("E_DORA", re.compile(r"lora_magnitude_vector|weight_m_wdecomp")),
    ("E_BIAS", re.compile(r"\.bias$")),
    ("E_VARIANT", re.compile(r"lora_diag")),
    (
        "E_MOE",
        re.compile(r"\.experts?\.|\.shared_experts?\.|block_sparse_moe|\.mlp\.(gate|router)\.|\.router\."),
    ),
)


@dataclass(frozen=True)
class LoraKey:
    """The A or the B of a module of a layer."""

    layer: int
    module: Module
    side: Literal["A", "B"]
    name: str
    """The module's name in the base: what PEFT's patterns are matched against."""
    infix: str
    """The adapter's name that raw state dicts have in their keys; else empty."""


@dataclass(frozen=True)
class RefusedKey:
    """A key that is no A or B of a module that is served."""

    code: str
    """E_UNKNOWN_KEY, or what is known about such keys."""
    cause: str
    """What keys of the same cause have in common, for one finding about all of them."""


ParsedKey: TypeAlias = LoraKey | RefusedKey


def parse_key(key: str) -> ParsedKey:
    """Return what a key stands for."""
    for code, pattern in _KNOWN_REFUSALS:
        if pattern.search(key):
            return RefusedKey(code, "")
    plain = ".".join(part for part in key.split(".") if part not in _WRAPPERS).removeprefix("module.")
    if not plain.startswith(_ROOT):
        return RefusedKey("E_UNKNOWN_KEY", "")
    match = _LORA.fullmatch(plain.removeprefix(_ROOT))
    place = _PLACE.fullmatch(match["module"]) if match else None
    if match is None or place is None:
        return RefusedKey("E_UNKNOWN_KEY", "")
    if place["decoder"] not in _DECODERS:
        return RefusedKey("E_PREFIX", place["decoder"].rstrip("."))
    group, _, leaf = place["path"].rpartition(".")
    if leaf not in _GROUPS.get(group, ()):
        return RefusedKey("E_MODULE", place["path"])
    side: Literal["A", "B"] = "A" if match["side"] == "A" else "B"
    return LoraKey(int(place["layer"]), BY_HF[leaf], side, match["module"], match["infix"] or "")
