"""Keys, pairs and shapes of an adapter's tensors against the base: from a header alone."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from builder_service.domain.adapter_config import AdapterConfig
from builder_service.domain.full_tensors import EMBED_FIX, FullTensor
from builder_service.domain.grouping import MAX_LISTED_PLACES, Grouping
from builder_service.domain.own_rows import TokenTensor
from builder_service.domain.pairs import Lone, Pair
from builder_service.domain.rules.stacks import MERGE, unstack_tensors
from builder_service.domain.rules.vectors import check_vectors, refuse_vectors, report_left_out
from builder_service.domain.safetensors_header import READABLE, Tensor, TensorFile
from builder_service.domain.tensor_names import (
    FullKey,
    LoraKey,
    RefusedKey,
    Side,
    TokensKey,
    TowerKey,
    nearest_key,
    parse_key,
)
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.families import load_families
from loramux_shared.bases.groups import GroupShape
from loramux_shared.bases.layers import ExpertsLayer
from loramux_shared.bundle.modules import NO_LAYER, label
from loramux_shared.faults import Finding
from loramux_shared.wording import listed

_KEY_FIXES: Final = {
    "E_CONTAINER": "Convert it to PEFT's form: adapter_config.json and lora_A, lora_B by the base's own names.",
    "E_PREFIX": "Only layers of the text decoder are served: train with exclude_modules for the others.",
    "E_EMBED": EMBED_FIX,
    "E_MLX": "MLX stores A and B transposed, with an absolute scale: convert it to PEFT's form.",
    "E_MOE": f"Train without the experts and routers (exclude_modules), or: {MERGE}",
}
_FIXES_BY_CAUSE: Final = {
    "VeLoRA": "It is a state of the training, and no answer depends on it: save without these tensors."
}
_SERVED: Final = "lora_A and lora_B of projections of attention and dense MLP"
_FOUND: Final = {
    "E_MOE": "tensors of experts or a router",
    "E_EMBED": "tensors of embeddings or a head",
    "E_DORA": "magnitudes of DoRA in the names of its authors' code",
    "E_BIAS": "biases under unknown names",
    "E_MLX": "MLX's names of A and B",
}
_TOWERS_FIX: Final = "Nothing is lost for texts. Train with exclude_modules for the tower for a smaller file."
EMPTY_FIX: Final = (
    "This is what DeepSpeed ZeRO-3 saves without gathering: save again with "
    "stage3_gather_16bit_weights_on_model_save, or from the consolidated state dict."
)


@dataclass(frozen=True)
class AdapterLimits:
    """The limits of a deployment for its adapters."""

    base: ModelConfig
    max_rank: int
    target_modules: frozenset[str]
    """TensorRT-LLM's names; empty: all."""


@dataclass(frozen=True)
class Sorted:
    """The tensors of a file by what they are; every other one was reported."""

    pairs: list[Pair]
    """Pairs by layer, module id and expert."""
    lone: list[Lone]
    """Vectors of modules without A and B."""
    fulls: list[FullTensor]
    towers: tuple[str, ...]
    """Keys of what no text passes."""
    tokens: list[TokenTensor]
    file: TensorFile
    """To read them from."""

    @property
    def keys(self) -> list[LoraKey]:
        """The keys of the adapted modules."""
        return [*(pair.key for pair in self.pairs), *(lone.key for lone in self.lone)]


_Sides: TypeAlias = dict[tuple[int, str, int | None], list[tuple[LoraKey, Tensor]]]
"""Tensors of modules by layer, path and expert."""


def sort_tensors(
    file: TensorFile, base: ModelConfig, report: Grouping, parameters: tuple[str, ...] = ()
) -> Sorted:
    """Sort the tensors of a file by kind; report those that cannot be used.

    parameters are ``target_parameters`` of the config.
    """
    sides: _Sides = defaultdict(list)
    infixes: dict[str, str] = {}
    fulls, tokens, towers = [], [], []
    has_towers = load_families()[base.architecture][0].nested
    for name, tensor in file.tensors.items():
        parsed = parse_key(name, base.dims.fused, base.renamed, base.layer_names, experts=base.has_experts)
        match parsed:
            case RefusedKey():
                _refuse(parsed, name, base, report)
            case TowerKey() if not has_towers:
                _refuse(RefusedKey("E_PREFIX", parsed.tower), name, base, report)
            case TowerKey():
                towers.append(name)
            case FullKey():
                fulls.append(FullTensor(parsed, tensor))
            case TokensKey():
                _check_storage(tensor, report)
                infixes.setdefault(parsed.infix, name)
                tokens.append(TokenTensor(parsed, tensor))
            case LoraKey():
                _check_storage(tensor, report)
                if parsed.side not in _OF_BASE:  # keys of the base have no adapter's name
                    infixes.setdefault(parsed.infix, name)
                sides[parsed.layer, parsed.path, parsed.expert].append((parsed, tensor))
    if len(infixes) > 1:
        _refuse_several(infixes, report)
        sides.clear()  # the pairs of A and B are ambiguous
    found, lone = _pair_sides(sides, report)
    file, pairs = unstack_tensors(file, found, base, parameters, report)
    pairs.sort(key=lambda pair: pair.order)
    _once_each(pairs, report)
    return Sorted(pairs, lone, fulls, tuple(sorted(towers)), tokens, file)


def _refuse_several(infixes: Mapping[str, str], report: Grouping) -> None:
    """Report a file with tensors of several adapters; infixes has a tensor of each by the adapter's name."""
    report.add(
        "E_ADAPTER_INFIX",
        ", ".join(sorted(infixes.values())),
        expected="one adapter",
        found=", ".join(sorted(name or "(no name)" for name in infixes)),
        fix="Save one adapter: save_pretrained(selected_adapters=[...]).",
    )


def _pair_sides(sides: _Sides, report: Grouping) -> tuple[list[Pair], list[Lone]]:
    """Return the pairs of modules that have A and B, and the vectors of modules that have nothing else."""
    pairs, vectors = [], []
    for entries in sides.values():
        if (lone := _lone(entries)) is not None:
            vectors.append(lone)
        elif (pair := _pair(entries, report)) is not None:
            pairs.append(pair)
    return pairs, vectors


def check_pairs(pairs: list[Pair], config: AdapterConfig, limits: AdapterLimits, report: Grouping) -> None:
    """Report every pair that does not fit itself, the config, the base or the deployment."""
    for pair in pairs:
        if not _is_tied(pair, pairs, config, limits.base):
            _check_targets(pair, config, report)
        if 0 in pair.a.shape or 0 in pair.b.shape:
            continue  # reported as E_EMPTY_WEIGHTS
        if len(pair.a.shape) != 2 or len(pair.b.shape) != 2 or pair.a.shape[0] != pair.b.shape[1]:
            report.add(
                "E_RANK_SHAPE",
                pair.place,
                cause=(pair.key.leaf, pair.a.shape, pair.b.shape),
                expected="lora_A (rank, in) and lora_B (out, rank)",
                found=f"lora_A {pair.a.shape} and lora_B {pair.b.shape}",
                fix="A and B are of different adapters: save the adapter again.",
            )
            continue
        _check_rank(pair, config, limits, report)
        _check_place(pair, limits, report)
        check_vectors(pair, config, report)


def tower_warning(towers: tuple[str, ...]) -> list[Finding]:
    """Return the warning about tensors of towers, which were left out."""
    if not towers:
        return []
    found = "of a tower that no text passes, left out"
    return [Finding(code="W_TOWER", where=listed(towers, MAX_LISTED_PLACES), found=found, fix=_TOWERS_FIX)]


def _refuse(key: RefusedKey, name: str, base: ModelConfig, report: Grouping) -> None:
    if key.code != "E_UNKNOWN_KEY":
        fixes = _KEY_FIXES | {"E_MODULE": f"The base has {_listed(base.groups, base)}."}
        fix = _FIXES_BY_CAUSE.get(key.cause) or fixes.get(key.code, MERGE)
        found = key.cause or _FOUND[key.code]
        report.add(key.code, name, cause=key.cause, expected=_SERVED, found=found, fix=fix)
        return
    near = nearest_key(name, base.dims.fused, base.renamed, base.layer_names)
    fix = f"Rename the keys: this one to {near}." if near else f"Expected keys like {_example(base)}."
    found = "keys of an unknown form"
    report.add(
        "E_UNKNOWN_KEY", name, cause=bool(near), expected=_SERVED, found=found, fix=fix, places_listed=10
    )


def _example(base: ModelConfig) -> str:
    before = (*base.layer_names, "model.layers.")[0]
    return f"base_model.model.{before}0.{base.path('attn_q')}.lora_A.weight"


def _check_storage(tensor: Tensor, report: Grouping) -> None:
    if 0 in tensor.shape:
        report.add("E_EMPTY_WEIGHTS", tensor.name, expected="elements", found="none", fix=EMPTY_FIX)
    if tensor.dtype not in READABLE:
        fix = "Save the adapter in float32, float16 or bfloat16."
        found = tensor.dtype
        report.add("E_DTYPE", tensor.name, cause=found, expected="F32, F16 or BF16", found=found, fix=fix)


_OF_BASE: Final[tuple[Side, ...]] = ("bias", "bare_bias")
_SIDES: Final[Mapping[Side, str]] = {
    "A": "lora_A",
    "B": "lora_B",
    "magnitude": "lora_magnitude_vector",
    "lora_bias": "lora_B.bias",
    "bias": "base_layer.bias",
    "bare_bias": "bias",
    "scale": "ia3_l",
}
"""Names of the tensors of a module."""


def _lone(entries: list[tuple[LoraKey, Tensor]]) -> Lone | None:
    """A bias of a module that PEFT has not wrapped, or a scale, where it is all there is."""
    key, tensor = entries[0]
    return Lone(key, tensor) if len(entries) == 1 and key.side in {"bare_bias", "scale"} else None


def _pair(entries: list[tuple[LoraKey, Tensor]], report: Grouping) -> Pair | None:
    first, by_side = entries[0][0], {side: list[Tensor]() for side in _SIDES}
    for key, tensor in entries:
        by_side[key.side].append(tensor)
    wrong = [side for side, found in by_side.items() if len(found) > 1 or (side in {"A", "B"} and not found)]
    for side in wrong:
        report.add(
            "E_PAIR",
            first.place,
            cause=(first.leaf, side, len(by_side[side])),
            expected=f"one {_SIDES[side]}",
            found=str(len(by_side[side])),
            fix="The file was cut or merged: save the adapter again.",
        )
    one = {side: found[0] for side, found in by_side.items() if found}
    if wrong or refuse_vectors(first, one, report):
        return None
    return Pair(first, one["A"], one["B"], one.get("magnitude"), one.get("lora_bias"), one.get("bias"))


def _once_each(pairs: list[Pair], report: Grouping) -> None:
    """A fused projection and a part of it in one layer would adapt that part twice."""
    seen: dict[tuple[int, int, int | None], Pair] = {}
    for pair in pairs:
        for module in pair.key.modules:
            other = seen.setdefault((pair.key.layer, module.id, pair.key.expert), pair)
            if other is not pair:
                report.add(
                    "E_PAIR",
                    pair.place,
                    cause=(other.key.leaf, pair.key.leaf),
                    expected=f"{module.hf} once",
                    found=f"in {other.key.leaf} and in {pair.key.leaf}",
                    fix="Files of two adapters were merged: save one adapter.",
                )


def _check_targets(pair: Pair, config: AdapterConfig, report: Grouping) -> None:
    """PEFT loads the tensors of modules that the config chooses, and drops the others without a word."""
    if not pair.key.of_parameter and (field := config.left_out_by(pair.key.name)):
        report_left_out(pair.place, field, "tensors", config, report)


def _is_tied(pair: Pair, pairs: list[Pair], config: AdapterConfig, base: ModelConfig) -> bool:
    """Return True for a head whose adapter PEFT tied to the embeddings': the config names those alone."""
    if pair.key.layer != NO_LAYER or not (config.ensure_weight_tying and base.tied_embeddings):
        return False
    others = [other.key.name for other in pairs if other.key.layer == NO_LAYER and other is not pair]
    return pair.key.modules[0].name == "head" and any(not config.left_out_by(name) for name in others)


def _check_rank(pair: Pair, config: AdapterConfig, limits: AdapterLimits, report: Grouping) -> None:
    rank, trained = pair.a.shape[0], pair.trained_rank
    ranks = config.ranks_of(pair.key.name)
    if ranks and trained and trained not in ranks:
        report.add(
            "E_RANK_SHAPE",
            pair.place,
            cause=("config", ranks, trained),
            expected=f"rank {ranks[0]}, as adapter_config.json says",
            found=f"rank {trained} in the tensors",
            fix="Correct r or rank_pattern in adapter_config.json.",
        )
    if rank > limits.max_rank:
        report.add(
            "E_RANK_MAX",
            pair.place,
            cause=rank,
            expected=f"rank <= max_lora_rank {limits.max_rank}",
            found=f"rank {rank}",
            fix=f"Set max_lora_rank to at least {rank}.",
        )


def _check_place(pair: Pair, limits: AdapterLimits, report: Grouping) -> None:
    base, modules = limits.base, pair.key.modules
    features = pair.features(base)
    of_layer = pair.key.layer != NO_LAYER
    if of_layer and pair.key.layer >= base.dims.num_layers:
        report.add(
            "E_LAYER",
            pair.place,
            expected=f"layers 0 to {base.dims.num_layers - 1}",
            found=f"layer {pair.key.layer}",
            fix="The adapter is for a deeper base.",
        )
    elif features is None:
        report.add(
            "E_MODULE",
            pair.place,
            cause=("absent", pair.key.leaf),
            expected=f"modules that this layer of the base has: "
            f"{_listed(base.layer_groups[pair.key.layer], base)}",
            found=pair.key.leaf,
            fix="The adapter was trained on another base.",
        )
    beyond = [module.name for module in modules if module.name not in limits.target_modules]
    if limits.target_modules and beyond:
        report.add(
            "E_MODULE",
            pair.place,
            cause=("ceiling", *beyond),
            expected=f"lora_target_modules {', '.join(sorted(limits.target_modules))}",
            found=", ".join(beyond),
            fix=f"Add {', '.join(beyond)} to lora_target_modules.",
        )
    if features is None:
        return
    spec = base.layers[pair.key.layer].mlp if of_layer else None
    if pair.key.expert is not None and isinstance(spec, ExpertsLayer) and pair.key.expert >= spec.num:
        report.add(
            "E_MODULE",
            pair.place,
            cause="no such expert",
            expected=f"experts 0 to {spec.num - 1}",
            found=f"expert {pair.key.expert}",
            fix="The adapter was trained on another base.",
        )
    found = (pair.a.shape[1], pair.b.shape[0])
    expected = (features[0][0], sum(out for _, out in features))
    if found != expected:
        report.add(
            "E_DIMS",
            pair.place,
            cause=(pair.key.leaf, found),
            expected=f"{pair.key.leaf} in={expected[0]} out={expected[1]}",
            found=f"in={found[0]} out={found[1]}",
            fix="The adapter was trained on another base.",
        )


def _listed(groups: tuple[GroupShape, ...], base: ModelConfig) -> str:
    names = dict.fromkeys(label(base.path(module)) for group in groups for module in group.modules)
    return ", ".join(names)
