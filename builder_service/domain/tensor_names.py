"""The map from the key of a tensor to a module of a layer, by a whitelist; other keys are refused by name."""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, NamedTuple, TypeAlias

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.unused import TOWER
from loramux_shared.bundle.modules import (
    BY_PATH,
    EXPERTS,
    FUSED_OF_EXPERTS,
    FUSED_PATHS,
    NO_LAYER,
    OF_EXPERTS,
    OF_NO_LAYER,
    Module,
    Renamed,
    label,
)

# Names that wrappers of the trained model leave in the keys, in any place.
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
"""Prefixes of modules that have the embeddings or the head of the text decoder."""
MAX_KEY_CHARACTERS: Final = 512
"""Longest key; a longer one names no module."""
_MAX_CACHED_KEYS: Final = 8192
"""Keys that are parsed once for all adapters, which mostly have the same; 80 layers have 1120."""
Side: TypeAlias = Literal["A", "B", "magnitude", "lora_bias", "bias", "bare_bias", "scale"]
"""Role of a tensor in its module.

A factor, DoRA's magnitude, the bias of lora_B, or the base's own bias, trained, bare where the key does not say
that PEFT has wrapped the module; or the scale of IA3.
"""
_INFIX: Final = r"(?:\.(?P<infix>[^.]+))?"
_FORMS: Final[Mapping[Side, re.Pattern[str]]] = {
    "A": re.compile(rf"(?P<module>.+)\.lora_A{_INFIX}\.weight"),
    "B": re.compile(rf"(?P<module>.+)\.lora_B{_INFIX}\.weight"),
    "lora_bias": re.compile(rf"(?P<module>.+)\.lora_B{_INFIX}\.bias"),
    # as PEFT saves them, and as state dicts of several of its releases have them
    "magnitude": re.compile(rf"(?P<module>.+)\.lora_magnitude_vector(?:\.weight|{_INFIX}(?:\.weight)?)"),
    "scale": re.compile(rf"(?P<module>.+)\.ia3_l{_INFIX}"),
}
_OF_EMBEDDING: Final[Mapping[Side, re.Pattern[str]]] = {
    "A": re.compile(rf"(?P<module>.+)\.lora_embedding_A{_INFIX}"),
    "B": re.compile(rf"(?P<module>.+)\.lora_embedding_B{_INFIX}"),
}
_OF_NO_LAYER: Final = re.compile(r"(?P<decoder>(?:[^.]+\.)*?)(?P<path>embed_tokens|lm_head)")
_BIAS: Final = re.compile(r"(?P<module>.+?)(?P<wrapped>\.base_layer)?\.bias")
_PLACE: Final = re.compile(
    r"(?P<decoder>(?:[^.]+\.)*?)layers\.(?P<layer>0|[1-9][0-9]{0,5})\.(?P<path>[^.]+(?:\.[^.]+)*)"
)
# A whole matrix or a bias of the base, as PEFT saves it or as a raw state dict names it.
_FULL: Final = re.compile(
    r"(?P<name>.+?)(?:\.modules_to_save(?:\.[^.]+)?|(?P<base>\.original_module|\.base_layer))?"
    r"\.(?P<kind>weight|bias)"
)
_TOKENS: Final = re.compile(r"(?P<name>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.(?P<infix>[^.]+))?")
_EMBEDDING: Final = re.compile(
    r"(^|\.)(embed_tokens|lm_head|unembed_tokens|wte|embed_out|word_embeddings)(\.|$)"
)

# Kinds of keys that are refused with a reason of their own, in the order of the checks.
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
        ("E_DORA", "", r"weight_m_wdecomp"),
        ("E_VARIANT", "KaSA", r"lora_diag"),
        ("E_VARIANT", "VeLoRA", r"lora_velora_"),
    )
)
_MIXTURE: Final = re.compile(
    r"\.experts?\.|\.shared_experts?\.|block_sparse_moe|\.mlp\.(gate|router)\.|\.router\."
)
_OF_EXPERTS: Final = re.compile(
    r"(?:mlp\.|feed_forward\.|(?P<mixtral>block_sparse_moe\.))?experts"
    r"(?:\.(?P<expert>0|[1-9][0-9]{0,4}))?(?:\.(?P<leaf>\w+))?"
)
"""Modules of single experts, and what PEFT wraps around the parameters of all."""
_OF_MIXTRAL: Final = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
INNER: Final = f"{EXPERTS}.base_layer"
"""Path of a wrapper inside another, where PEFT wraps two parameters of a module."""


@dataclass(frozen=True)
class LoraKey:
    """A, B or a vector of a module of a layer."""

    layer: int
    path: str
    """The module within the layer: ``self_attn.q_proj``, or ``self_attn.qkv_proj`` in a base that has it."""
    side: Side
    name: str
    """The module's name in the base: what PEFT's patterns are matched against."""
    infix: str
    """The adapter's name that raw state dicts have in their keys; else empty."""
    expert: int | None = None
    """Expert of a mixture that the tensor belongs to."""
    of_parameter: bool = False
    """True if it was trained as a part of a parameter, and not as a module."""
    own_path: str = ""
    """The base's own name of the module within the layer, where it is another one."""

    @property
    def modules(self) -> tuple[Module, ...]:
        """The modules that it adapts, in the order of its output rows: several of a fused projection."""
        return FUSED_PATHS.get(self.path) or FUSED_OF_EXPERTS.get(self.path) or (BY_PATH[self.path],)

    @property
    def leaf(self) -> str:
        """Return the name of the module for people."""
        return label(self.own_path or self.path)

    def names_in(self, base: ModelConfig, kind: str) -> list[str]:
        """Return what a base may call the tensor that has the module's weight or bias, from `first_row` on."""
        path, _ = base.stored.get(self.path, (self.own_path or self.path, 0))
        own = f"{base.names.layer.format(index=self.layer)}{path}.{kind}"
        return [f"{prefix}{own}" for prefix in base.names.prefixes]

    def first_row(self, base: ModelConfig) -> int:
        """Return the module's first row in that tensor."""
        return base.stored.get(self.path, ("", 0))[1]

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
        """Return True if it adapts a parameter of all experts, and the key does not say which."""
        return self.path in (EXPERTS, INNER)


@dataclass(frozen=True)
class FullKey:
    """A whole matrix or a bias; it is redundant where it equals the base's, and refused where it does not."""

    name: str
    """The base's module."""
    code: str
    """Code of the refusal."""
    of_base: bool = False
    """True if the key belongs to the base, from before the adapter."""
    kind: str = "weight"
    """Tensor of the module: ``weight`` or ``bias``."""

    @property
    def tensor(self) -> str:
        """The base's tensor."""
        return f"{self.name}.{self.kind}"

    @property
    def module(self) -> Module | None:
        """Embeddings or head, where it is the matrix of one of them."""
        return _module_of(self.name) if self.kind == "weight" else None


@dataclass(frozen=True)
class TokensKey:
    """Rows of embeddings or a head that are trained by themselves, in the order of the config's indices."""

    name: str
    """The module's name in the base."""
    module: Module
    infix: str


@dataclass(frozen=True)
class TowerKey:
    """A tensor of a module that sees images or hears sound, which no text passes."""

    tower: str


@dataclass(frozen=True)
class RefusedKey:
    """A key that is no A or B of a module that is served."""

    code: str
    """E_UNKNOWN_KEY, or what is known about such keys."""
    cause: str
    """Common part of the keys with the same cause, for one finding about all of them."""


ParsedKey: TypeAlias = LoraKey | FullKey | TokensKey | TowerKey | RefusedKey


def parse_key(
    key: str,
    fused: Set[str] = frozenset(),
    renamed: frozenset[Renamed] = frozenset(),
    layers: tuple[str, ...] = (),
    *,
    experts: bool = False,
) -> ParsedKey:
    """Return what a key stands for, in a base with these modules, and with experts or without.

    layers are what stands before the number of a layer, where that is not what most bases have.
    """
    if len(key) > MAX_KEY_CHARACTERS:
        return RefusedKey("E_UNKNOWN_KEY", "")
    return _parse(key, _Modules(frozenset(fused), renamed, layers), experts)


class _Modules(NamedTuple):
    """The modules of a base that others do not have."""

    fused: frozenset[str]
    renamed: frozenset[Renamed]
    layers: tuple[str, ...]


@lru_cache(maxsize=_MAX_CACHED_KEYS)
def _parse(key: str, modules: _Modules, experts: bool) -> ParsedKey:
    if (refused := _known_refusal(key, experts=experts)) is not None:
        return refused
    plain = ".".join(part for part in key.split(".") if part not in _WRAPPERS).removeprefix("module.")
    name = plain.removeprefix(_ROOT)
    rooted = plain != name
    return (
        _read_embedding_factor(name, rooted=rooted)
        or _read_lora(name, modules, rooted=rooted)
        or _read_full(name, modules, rooted=rooted)
        or _read_tokens(name, rooted=rooted)
        or RefusedKey("E_UNKNOWN_KEY", "")
    )


def _known_refusal(key: str, *, experts: bool) -> RefusedKey | None:
    """Return the refusal of a key whose form is known not to be served; None for other keys."""
    for code, cause, pattern in _KNOWN_REFUSALS:
        if pattern.search(key):
            return RefusedKey(code, cause)
    return RefusedKey("E_MOE", "") if _MIXTURE.search(key) and not experts else None


def _read_embedding_factor(name: str, *, rooted: bool) -> LoraKey | RefusedKey | None:
    """Read A or B of embeddings; a key without the root of PEFT's models (rooted) is refused."""
    for side, pattern in _OF_EMBEDDING.items():
        if match := pattern.fullmatch(name):
            return _embedding_key(match, side) if rooted else RefusedKey("E_EMBED", "")
    return None


def _read_lora(name: str, modules: _Modules, *, rooted: bool) -> LoraKey | TowerKey | RefusedKey | None:
    """Read a factor or a vector of any module; None for keys of another form."""
    for side, pattern in _FORMS.items():
        if match := pattern.fullmatch(name):
            of_embedding = is_embedding(match["module"])
            if of_embedding and side not in {"A", "B", "magnitude"}:
                return RefusedKey("E_EMBED", "")
            if not rooted:
                return RefusedKey("E_UNKNOWN_KEY", "")
            return _embedding_key(match, side) if of_embedding else _lora_key(match, modules, side)
    return None


def _read_full(name: str, modules: _Modules, *, rooted: bool) -> ParsedKey | None:
    """Read a whole matrix or a bias; None for keys of another form."""
    full = _FULL.fullmatch(name)
    if full is None:
        return None
    return _full_key(full, name, modules) if rooted else RefusedKey(_code_of(full, name), "")


def _read_tokens(name: str, *, rooted: bool) -> TokensKey | RefusedKey | None:
    """Read rows of some tokens; None for keys of another form."""
    tokens = _TOKENS.fullmatch(name)
    if tokens is None:
        return None
    module = _module_of(tokens["name"]) if rooted else None
    return TokensKey(tokens["name"], module, tokens["infix"] or "") if module else RefusedKey("E_EMBED", "")


def _full_key(full: re.Match[str], name: str, modules: _Modules) -> ParsedKey:
    """Recognize a bias of a module that adapters may have; the rest counts as a copy of the base's."""
    bias = _BIAS.fullmatch(name)
    if bias is not None and not is_embedding(name):
        key = _lora_key(bias, modules, "bias" if bias["wrapped"] else "bare_bias")
        if isinstance(key, TowerKey) or (isinstance(key, LoraKey) and key.expert is None and not key.holds_all):
            return key
    return FullKey(full["name"], _code_of(full, name), full["base"] is not None, full["kind"])


def _code_of(full: re.Match[str], name: str) -> str:
    if "modules_to_save" in name or is_embedding(name):
        return "E_EMBED"
    return "E_BIAS" if full["kind"] == "bias" else "E_UNKNOWN_KEY"


def is_embedding(name: str) -> bool:
    """Return True for names of embeddings and heads."""
    return _EMBEDDING.search(name) is not None


def nearest_key(
    key: str,
    fused: Set[str] = frozenset(),
    renamed: frozenset[Renamed] = frozenset(),
    layers: tuple[str, ...] = (),
) -> str:
    """Return a key like this one that would be understood, or nothing."""
    if len(key) > MAX_KEY_CHARACTERS:
        return ""
    guess = key.replace(".attention.", ".self_attn.")
    if guess.endswith(("lora_A", "lora_B")):
        guess += ".weight"
    for prefix in ("", _ROOT, f"{_ROOT}model."):
        if isinstance(parse_key(prefix + guess, fused, renamed, layers), LoraKey):
            return prefix + guess
    return ""


def _lora_key(match: re.Match[str], modules: _Modules, side: Side) -> LoraKey | TowerKey | RefusedKey:
    name = match["module"]
    if tower := TOWER.search(name):
        return TowerKey(tower[1])
    place = _place_of(name, modules)
    if place is None:
        return RefusedKey("E_UNKNOWN_KEY", "")
    if place["decoder"] not in _DECODERS:
        return RefusedKey("E_PREFIX", place["decoder"].rstrip("."))
    path, expert = _expert_path(place["path"])
    usual = dict(modules.renamed)
    path, own_path = usual.get(path, path), path if path in usual else ""
    if not _is_known(path, expert, modules.fused) or (path in usual.values() and not own_path):
        return RefusedKey("E_MOE" if _MIXTURE.search(f".{name}.") else "E_MODULE", path)
    infix = match.groupdict().get("infix") or ""
    return LoraKey(int(place["layer"]), path, side, name, infix, expert, own_path=own_path)


def _place_of(name: str, modules: _Modules) -> re.Match[str] | None:
    """Return decoder, layer and path of a module of a layer; None for other names."""
    before = next((each for each in modules.layers if name.startswith(each)), None)
    return _PLACE.fullmatch(name if before is None else f"layers.{name.removeprefix(before)}")


def _expert_path(path: str) -> tuple[str, int | None]:
    """Return a path within a layer as our modules have it, and the expert that it names."""
    own = _OF_EXPERTS.fullmatch(path)
    if own is None:
        return path, None
    leaf = _OF_MIXTRAL.get(own["leaf"], own["leaf"]) if own["mixtral"] else own["leaf"]
    ours = ".".join(part for part in (EXPERTS, leaf) if part)
    return ours, None if own["expert"] is None else int(own["expert"])


def _module_of(name: str) -> Module | None:
    """Return embeddings or head by their name in the base; None for any other module."""
    place = _OF_NO_LAYER.fullmatch(name)
    return BY_PATH[place["path"]] if place and place["decoder"] in _ROOTS else None


def _embedding_key(match: re.Match[str], side: Side) -> LoraKey | RefusedKey:
    """Return the key of embeddings or head, each of which PEFT gives names of its own."""
    place = _OF_NO_LAYER.fullmatch(match["module"])
    own = place is not None and place["path"] == "embed_tokens" and side in _OF_EMBEDDING
    if place is None or match.re is not (_OF_EMBEDDING if own else _FORMS)[side]:
        return RefusedKey("E_EMBED", "")
    if place["decoder"] not in _ROOTS:
        return RefusedKey("E_PREFIX", place["decoder"].rstrip("."))
    return LoraKey(NO_LAYER, place["path"], side, match["module"], match["infix"] or "")


def _is_known(path: str, expert: int | None, fused: Set[str]) -> bool:
    """Return True if a layer or an expert has such a module, or all experts' parameters such a wrapper."""
    if path in (EXPERTS, INNER) or (path in BY_PATH and BY_PATH[path].id in OF_EXPERTS):
        return (path in BY_PATH) is (expert is not None)
    if expert is not None or (path in BY_PATH and BY_PATH[path].id in OF_NO_LAYER):
        return False
    return path in BY_PATH or (path in FUSED_PATHS and path.rpartition(".")[2] in fused)
