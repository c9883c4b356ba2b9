"""From the key of a tensor to a module of a layer, by a whitelist; what is not on it is refused by name."""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, TypeAlias

from loramux_shared.bundle.modules import (
    BY_PATH,
    EXPERTS,
    FUSED_OF_EXPERTS,
    FUSED_PATHS,
    NO_LAYER,
    OF_EXPERTS,
    OF_NO_LAYER,
    Module,
    shown,
)

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
_ROOTS: Final = (*_DECODERS, "language_model.")
"""What has the embeddings or the head of the text decoder."""
MAX_KEY: Final = 512
"""Characters; what is longer is no name of a module."""
_KEPT: Final = 8192
"""Keys that are parsed once for all adapters, which mostly have the same; 80 layers have 1120."""
_LORA: Final = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<infix>[^.]+))?\.weight")
_LORA_EMBEDDING: Final = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.(?P<infix>[^.]+))?")
_OF_NO_LAYER: Final = re.compile(r"(?P<decoder>(?:[^.]+\.)*?)(?P<path>embed_tokens|lm_head)")
_PLACE: Final = re.compile(
    r"(?P<decoder>(?:[^.]+\.)*?)layers\.(?P<layer>[0-9]{1,6})\.(?P<path>[^.]+(?:\.[^.]+)*)"
)
_TOWER: Final = re.compile(
    r"(?:^|\.)(visual|vision_\w+|audio_\w+|multi_modal_projector|mm_projector|embed_vision|embed_audio)\."
)
# A whole matrix of the base, as PEFT saves it or as a raw state dict names it.
_FULL: Final = re.compile(
    r"(?P<name>.+?)(?:\.modules_to_save(?:\.[^.]+)?|(?P<base>\.original_module|\.base_layer))?\.weight"
)
_TOKENS: Final = re.compile(r"(?P<name>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.(?P<infix>[^.]+))?")
_EMBEDDING: Final = re.compile(
    r"(^|\.)(embed_tokens|lm_head|unembed_tokens|wte|embed_out|word_embeddings)(\.|$)"
)

# Kinds of keys that are refused with a reason of their own, in the order in which they are tried.
_KNOWN_REFUSALS: Final = tuple(
    (code, cause, re.compile(pattern))
    for code, cause, pattern in (
        ("E_MLX", "", r"\.lora_[ab]$"),
        ("E_CONTAINER", "torchtune", r"\.lora_[ab]\.weight$"),
        ("E_CONTAINER", "mistral-finetune", r"\.(attention\.w[qkvo]|feed_forward\.w[123])\."),
        ("E_CONTAINER", "NeMo", r"\.(adapter_layer\.|lora_\w+_adapter\.|linear_(in|out)\.weight$)"),
        ("E_CONTAINER", "diffusers or kohya", r"\.lora(\.|_)(up|down)\.weight$|^lora_(unet|te\d?)_"),
        ("E_EMBED", "", r"trainable_tokens_original"),
        ("E_MODULE", "per_layer_model_projection", r"\.per_layer_model_projection\."),
        ("E_DORA", "", r"lora_magnitude_vector|weight_m_wdecomp"),
        ("E_BIAS", "", r"\.bias$"),
        ("E_VARIANT", "KaSA", r"lora_diag"),
        ("E_VARIANT", "VeLoRA", r"lora_velora_"),
    )
)
_MIXTURE: Final = re.compile(
    r"\.experts?\.|\.shared_experts?\.|block_sparse_moe|\.mlp\.(gate|router)\.|\.router\."
)
_OF_EXPERTS: Final = re.compile(r"(?:mlp\.)?experts(?:\.(?P<expert>0|[1-9][0-9]{0,4}))?(?:\.(?P<leaf>\w+))?")
"""Modules of single experts, and what PEFT wraps around the parameters of all."""
INNER: Final = f"{EXPERTS}.base_layer"
"""Where PEFT wraps two parameters of a module, one wrapper is in the other."""


@dataclass(frozen=True)
class LoraKey:
    """The A or the B of a module of a layer."""

    layer: int
    path: str
    """The module within the layer: ``self_attn.q_proj``, or ``self_attn.qkv_proj`` in a base that has it."""
    side: Literal["A", "B"]
    name: str
    """The module's name in the base: what PEFT's patterns are matched against."""
    infix: str
    """The adapter's name that raw state dicts have in their keys; else empty."""
    expert: int | None = None
    """Whose it is, of a mixture."""
    of_parameter: bool = False
    """Whether it was trained as a part of a parameter, and not as a module."""

    @property
    def modules(self) -> tuple[Module, ...]:
        """The modules that it adapts, in the order of its output rows: several of a fused projection."""
        return FUSED_PATHS.get(self.path) or FUSED_OF_EXPERTS.get(self.path) or (BY_PATH[self.path],)

    @property
    def leaf(self) -> str:
        """As people are told of it."""
        return shown(self.path)

    @property
    def place(self) -> str:
        """The module in words."""
        if self.layer == NO_LAYER:
            return self.path
        if self.expert is None:
            return f"layer {self.layer} {self.leaf}"
        return f"layer {self.layer} expert {self.expert} {self.path.rpartition('.')[2]}"

    @property
    def holds_all(self) -> bool:
        """Whether it adapts a parameter of all experts, and the key does not say which."""
        return self.path in (EXPERTS, INNER)


@dataclass(frozen=True)
class FullKey:
    """A whole matrix; it is redundant where it equals the base's, and refused where it does not."""

    name: str
    """The base's tensor."""
    code: str
    """What it is refused with."""
    of_base: bool = False
    """Whether the key says that it is what the base has, from before the adapter."""

    @property
    def module(self) -> Module | None:
        """Embeddings or head, where it is one of them."""
        return _module_of(self.name)


@dataclass(frozen=True)
class TokensKey:
    """Rows of embeddings or a head that are trained by themselves, in the order of the config's indices."""

    name: str
    """The module's name in the base."""
    module: Module
    infix: str


@dataclass(frozen=True)
class TowerKey:
    """The A or the B of a module that sees images or hears sound, which no text passes."""

    tower: str


@dataclass(frozen=True)
class RefusedKey:
    """A key that is no A or B of a module that is served."""

    code: str
    """E_UNKNOWN_KEY, or what is known about such keys."""
    cause: str
    """What keys of the same cause have in common, for one finding about all of them."""


ParsedKey: TypeAlias = LoraKey | FullKey | TokensKey | TowerKey | RefusedKey


def parse_key(key: str, fused: Set[str] = frozenset(), *, experts: bool = False) -> ParsedKey:
    """Return what a key stands for, in a base with these fused projections, and with experts or without."""
    return RefusedKey("E_UNKNOWN_KEY", "") if len(key) > MAX_KEY else _parse(key, frozenset(fused), experts)


@lru_cache(maxsize=_KEPT)
def _parse(key: str, fused: frozenset[str], experts: bool) -> ParsedKey:
    for code, cause, pattern in _KNOWN_REFUSALS:
        if pattern.search(key):
            return RefusedKey(code, cause)
    if _MIXTURE.search(key) and not experts:
        return RefusedKey("E_MOE", "")
    plain = ".".join(part for part in key.split(".") if part not in _WRAPPERS).removeprefix("module.")
    name = plain.removeprefix(_ROOT)
    if match := _LORA.fullmatch(name) or _LORA_EMBEDDING.fullmatch(name):
        of_no_layer = is_embedding(match["module"])
        if match.re is _LORA_EMBEDDING and not of_no_layer:
            return RefusedKey("E_EMBED", "")
        if plain != name:
            return _embedding_key(match) if of_no_layer else _lora_key(match, fused)
    elif full := _FULL.fullmatch(name):
        saved = "modules_to_save" in name or is_embedding(name)
        code = "E_EMBED" if saved else "E_UNKNOWN_KEY"
        return FullKey(full["name"], code, full["base"] is not None) if plain != name else RefusedKey(code, "")
    elif tokens := _TOKENS.fullmatch(name):
        module = _module_of(tokens["name"]) if plain != name else None
        return TokensKey(tokens["name"], module, tokens["infix"] or "") if module else RefusedKey("E_EMBED", "")
    return RefusedKey("E_UNKNOWN_KEY", "")


def is_embedding(name: str) -> bool:
    """True for names of embeddings and heads."""
    return _EMBEDDING.search(name) is not None


def nearest_key(key: str, fused: Set[str] = frozenset()) -> str:
    """Return a key like this one that would be understood, or nothing."""
    if len(key) > MAX_KEY:
        return ""
    guess = key.replace(".attention.", ".self_attn.")
    if guess.endswith(("lora_A", "lora_B")):
        guess += ".weight"
    for prefix in ("", _ROOT, f"{_ROOT}model."):
        if isinstance(parse_key(prefix + guess, fused), LoraKey):
            return prefix + guess
    return ""


def _lora_key(match: re.Match[str], fused: Set[str]) -> LoraKey | TowerKey | RefusedKey:
    if tower := _TOWER.search(match["module"]):
        return TowerKey(tower[1])
    place = _PLACE.fullmatch(match["module"])
    if place is None:
        return RefusedKey("E_UNKNOWN_KEY", "")
    if place["decoder"] not in _DECODERS:
        return RefusedKey("E_PREFIX", place["decoder"].rstrip("."))
    path, expert = place["path"], None
    if own := _OF_EXPERTS.fullmatch(path):
        path = ".".join(part for part in (EXPERTS, own["leaf"]) if part)
        expert = None if own["expert"] is None else int(own["expert"])
    if not _is_known(path, expert, fused):
        return RefusedKey("E_MOE" if _MIXTURE.search(f".{match['module']}.") else "E_MODULE", path)
    side: Literal["A", "B"] = "A" if match["side"] == "A" else "B"
    return LoraKey(int(place["layer"]), path, side, match["module"], match["infix"] or "", expert)


def _module_of(name: str) -> Module | None:
    """Return embeddings or head by their name in the base; None for any other module."""
    place = _OF_NO_LAYER.fullmatch(name)
    return BY_PATH[place["path"]] if place and place["decoder"] in _ROOTS else None


def _embedding_key(match: re.Match[str]) -> LoraKey | RefusedKey:
    """Return the key of embeddings or head, each of which PEFT gives names of its own."""
    place = _OF_NO_LAYER.fullmatch(match["module"])
    expected = _LORA_EMBEDDING if place is not None and place["path"] == "embed_tokens" else _LORA
    if place is None or match.re is not expected:
        return RefusedKey("E_EMBED", "")
    if place["decoder"] not in _ROOTS:
        return RefusedKey("E_PREFIX", place["decoder"].rstrip("."))
    side: Literal["A", "B"] = "A" if match["side"] == "A" else "B"
    return LoraKey(NO_LAYER, place["path"], side, match["module"], match["infix"] or "")


def _is_known(path: str, expert: int | None, fused: Set[str]) -> bool:
    """Whether there is such a module of a layer, or of an expert, or a wrapper of all experts' parameters."""
    if path in (EXPERTS, INNER) or (path in BY_PATH and BY_PATH[path].id in OF_EXPERTS):
        return (path in BY_PATH) is (expert is not None)
    if expert is not None or (path in BY_PATH and BY_PATH[path].id in OF_NO_LAYER):
        return False
    return path in BY_PATH or (path in FUSED_PATHS and path.rpartition(".")[2] in fused)
