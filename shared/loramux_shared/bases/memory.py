"""The memory plan of a replica: weights, adapters, buffers of steps, and key-value blocks from the rest.

A replica plans with this arithmetic, and `loramux doctor` foretells with it what the plan will be. On a GPU a
replica then measures what steps take, instead of reasoning.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Final, Literal

from loramux_shared.bases.cache import Cache, cache_entries
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.groups import GroupShape
from loramux_shared.bases.layers import ExpertsLayer
from loramux_shared.faults import ResourcesExhausted
from loramux_shared.runtime import Rounding
from loramux_shared.settings import InferenceSettings

ITEM_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
KV_SHARE: Final = {"cpu": 0.25, "cuda": 0.92}
"""Share of the free memory for the cache, without kv_memory_gb; the rest of a GPU is for fragments."""
MAX_CPU_KV_BYTES: Final = 4 * 10**9
"""Upper bound of the cache on a CPU."""
BANK_SHARE: Final = {"cpu": 0.25, "cuda": 0.3}
"""Largest share of the memory beside the weights for the adapter bank, without adapter_memory_gb."""
BANK_ROOM: Final = 4
"""Adapters for which there is room beside those that are registered at the start, and a quarter of those."""
USUAL_RANK: Final = 16
ALIGNING: Final = 1 << 16
"""Bytes by which a small adapter may be larger than what is reckoned."""
GRAPH_BYTES: Final = 8 * 2**20
"""Bytes of a CUDA graph of a few hundred launches, beside its tensors: a forecast. A replica measures it."""
RECORDED_ROWS: Final = 512
"""Rows of a step with prompts up to which it is recorded; larger steps take longer than their launches."""
SMALLEST_MIXED: Final = 16
BLEND_ROWS: Final = (8, 32, 128)
FINE_MIXED: Final = 256
"""Rows from which on a step computes few that it was not asked for."""
GB: Final = 1e9
Keeps = Literal["nothing", "int4", "blocks"]
"""Weights of few bits that operations multiply as a checkpoint keeps them: GPUs int4, and processors blocks."""
PACKED_GROUP: Final = 32
"""Numbers of 4 bits that share a scale are a multiple of it, where they are not widened at load."""
PACKED_GROUP_BYTES: Final = 5
"""Bytes of a scale and a zero point."""


@dataclass(frozen=True)
class Needs:
    """The memory that a replica holds beside its cache, in bytes."""

    weights: int
    """Bytes of the base; it is loaded before the rest is planned, as the adapters are."""
    adapters: int
    activations: int
    """The widest moment of the largest step."""
    graphs: int
    """Recorded steps, and the tensors that they share; 0 without graphs."""


@dataclass(frozen=True)
class MemoryPlan:
    """The sizes of the cache that fit."""

    blocks: tuple[int, ...]
    """Blocks of the cache, for each group of layers."""
    max_seq_len: int
    kv_bytes: int
    """Bytes of the cache, states included."""
    tokens: int
    """Tokens whose keys and values the cache holds."""
    seqs: int
    """Sequences that may run at once."""
    slots: int = 0
    """For states: one for each of them, and the snapshots' of prefixes."""
    spacing: int | None = None
    """Blocks between two snapshots; None: there are none."""


def plan_memory(
    free: int, needs: Needs, cache: Cache, *, share: float, ceiling: int | None = None
) -> MemoryPlan:
    """Divide the bytes that are free once weights and adapters are loaded.

    The cache takes what the settings say, or a share of what steps leave, ceiling at most; never more than all
    sequences can use. Raise ResourcesExhausted where steps, or a cache of that size, or one sequence, do not
    fit.
    """
    steps = needs.activations + needs.graphs
    left = free - steps
    budget = int(share * max(0, left)) if ceiling is None else min(int(share * max(0, left)), ceiling)
    budget = min(budget if cache.kv_bytes is None else cache.kv_bytes, cache.num_bytes(cache.most))
    if left <= 0 or budget > left:
        raise ResourcesExhausted(
            f"beside {_described(needs)}, {free / GB:.2f} GB are free; steps need {steps / GB:.2f} GB and the "
            f"key-value cache {budget / GB:.2f} GB. Lower LORAMUX_KV_MEMORY_GB, LORAMUX_MAX_BATCH_TOKENS or "
            "LORAMUX_MAX_BATCH_SEQS, or serve fewer adapters."
        )
    count = max(0, cache.fitting(budget))
    capacity = cache.capacity(count)
    if capacity < min(cache.longest, 2 * cache.block_size) or (cache.whole and capacity < cache.longest):
        raise ResourcesExhausted(
            f"the key-value cache holds {capacity} tokens ({budget / GB:.2f} GB at {_each(cache)}, beside "
            f"{_described(needs)}), and one sequence of max_seq_len={cache.longest} does not fit. "
            f"Raise LORAMUX_KV_MEMORY_GB or lower {'LORAMUX_MAX_BATCH_SEQS or ' if cache.state_bytes else ''}"
            "max_seq_len."
        )
    return MemoryPlan(
        cache.blocks(count),
        capacity,
        cache.num_bytes(count),
        tokens=max(cache.blocks(count)) * cache.block_size,
        seqs=cache.seats(count),
        slots=cache.seats(count) + cache.snapshot_states(count) if cache.state_bytes else 0,
        spacing=cache.spacing(count),
    )


def plan_on(device: str, free: int, needs: Needs, cache: Cache) -> MemoryPlan:
    """Plan, as `plan_memory` does, with the share of the cache that a kind of device, cpu or cuda, gives it."""
    ceiling = MAX_CPU_KV_BYTES if device == "cpu" else None
    return plan_memory(free, needs, cache, share=KV_SHARE[device], ceiling=ceiling)


def count_weights(config: ModelConfig) -> int:
    """Return how many numbers the weights of a model are, without norms and biases."""
    linears = sum(group.in_features * sum(group.out_features) for group in _every_group(config))
    tables = config.dims.vocab * config.dims.hidden * (1 if config.tied_embeddings else 2)
    return linears + tables + _count_inputs(config)


def _count_inputs(config: ModelConfig) -> int:
    if config.inputs is None:
        return 0
    return config.dims.num_layers * config.inputs.width * (config.inputs.vocab + config.dims.hidden)


def stays_packed(config: ModelConfig, settings: InferenceSettings, device: str) -> bool:
    """Return whether weights of few bits are served as the checkpoint keeps them."""
    keeps: Keeps = "nothing"
    if settings.backend == "triton" or (device == "cuda" and settings.backend == "auto"):
        keeps = "int4"
    elif device == "cpu" and settings.backend != "torch":
        keeps = "blocks"
    return settings.rounding is Rounding.NONE and may_stay_packed(config, keeps)


def may_stay_packed(config: ModelConfig, keeps: Keeps) -> bool:
    """Return whether a checkpoint's linears are such as a device multiplies: blocks, or 4 bits in groups."""
    found = config.quantization
    if found is None or found.columns_are_ordered:
        return False
    if found.in_blocks or keeps != "int4":
        return found.in_blocks and keeps == "blocks"
    return all(
        each.numbers == "int4" and each.rows == 1 and not (each.columns or 0) % PACKED_GROUP
        for each in found.schemes
    )


def widening(config: ModelConfig, file_bytes: int | None, dtype: str, *, packed: bool = False) -> str:
    """Return what the weights take that are widened to a type at load; empty where none are.

    file_bytes are those of the files, where they are known; packed says that linears stay as they are.
    """
    if config.quantization is None:
        return ""
    if packed and config.quantization.in_blocks:
        return f"weights stay {config.quantization.label}"
    if packed:
        return f"linears stay {config.quantization.label}, and are widened in registers"
    in_files = "" if file_bytes is None else f"{_size(file_bytes)} in the files, "
    memory = _size(ITEM_BYTES[dtype] * count_weights(config))
    return f"widened from {config.quantization.label} at load: {in_files}{memory} in memory as {dtype}"


def needs_of(
    config: ModelConfig,
    item_bytes: int,
    adapters: int,
    settings: InferenceSettings,
    device: str,
    *,
    graphs: bool,
    graph_bytes: int = GRAPH_BYTES,
) -> Needs:
    """Count what a model in numbers of item_bytes needs; adapters is what its adapters take, in bytes.

    graph_bytes is what a recorded step takes beside its tensors.
    """
    dims, sizes = config.dims, settings.sizes(device)
    inputs = 0 if config.inputs is None else dims.num_layers * config.inputs.width
    mixtures = [layer.mlp for layer in config.layers if isinstance(layer.mlp, ExpertsLayer)]
    widest = max(
        *(2 * group.in_features + 2 * sum(group.out_features) for group in config.groups),
        *(mixture.widest(dims.hidden) for mixture in mixtures),
    )
    row = item_bytes * (2 * dims.hidden + max(widest, 2 * inputs) + inputs)
    # A sampled row's logits are there once more in float32 when log probabilities are asked for.
    logits = sizes.seqs * dims.vocab
    recorded_rows = [size for size in mixed_buckets(sizes.tokens) if size <= RECORDED_ROWS]
    decodes = len(list(buckets(sizes.seqs)))
    # with adapters and without; and with two adapters to a row, or up to eight
    num_graphs = 2 * (decodes + len(recorded_rows)) + 2 * len(blend_buckets(sizes.seqs))
    if mixtures:  # and with adapters that touch no expert
        num_graphs += decodes + len(recorded_rows)
    held = max(sizes.seqs, *recorded_rows)
    recorded = num_graphs * graph_bytes + held * row + 2 * logits * item_bytes
    recorded += shaping_bytes(sizes.seqs, dims.vocab)
    return Needs(
        weights=weights_bytes(
            config, item_bytes, device, settings.rounding, packed=stays_packed(config, settings, device)
        ),
        adapters=adapters,
        activations=sizes.tokens * row + logits * (item_bytes + 8),
        graphs=recorded if graphs else 0,
    )


def weights_bytes(
    config: ModelConfig, item_bytes: int, device: str, quantization: Rounding, *, packed: bool = False
) -> int:
    """Return what the matrices of a base take, without biases and norms.

    Embeddings that are the head too are there once on a GPU, unless the head is rounded; a CPU has a copy. The
    experts of a GPU are not rounded. Packed linears have 4 bits as in the files, experts aside; blocks are as
    in the files, and embeddings take a byte each.
    """
    linears, experts = 0, 0
    for group in _every_group(config):
        count = group.in_features * sum(group.out_features)
        if group.expert is None or device == "cpu":
            linears += count
        else:
            experts += count
    table, of_head = config.dims.vocab * config.dims.hidden, quantization.of_head
    tied = config.tied_embeddings and device == "cuda" and of_head is Rounding.NONE
    head = 0 if tied or not config.generates else of_head.weight_bytes(table, item_bytes)
    whole = experts + table + _count_inputs(config)
    if packed and config.quantization is not None and config.quantization.in_blocks:
        return config.quantization.linear_bytes + config.quantization.table_bytes + table
    if packed and config.quantization is not None:
        sharing = min(each.columns or PACKED_GROUP for each in config.quantization.schemes)
        return linears // 2 + linears // sharing * PACKED_GROUP_BYTES + item_bytes * whole + head
    return quantization.weight_bytes(linears, item_bytes) + item_bytes * whole + head


def token_bytes(config: ModelConfig, item_bytes: int, quantization: Rounding) -> int:
    """Return what one token reads of the weights: linears, those experts that are chosen, and the head."""
    count = sum(
        group.in_features * sum(group.out_features)
        for layer, groups in zip(config.layers, config.layer_groups, strict=True)
        for group in groups
        if group.expert is None or (isinstance(layer.mlp, ExpertsLayer) and group.expert < layer.mlp.top_k)
    )
    table = 0 if not config.generates else config.dims.vocab * config.dims.hidden
    head = quantization.of_head.weight_bytes(table, item_bytes)
    return quantization.weight_bytes(count, item_bytes) + head


def shaping_bytes(max_seqs: int, vocab: int) -> int:
    """Return what the sampler on a device takes at most for sequences that shape their logits.

    Counts and masks of all of them, made when the first one asks; and for 64 of them, which are drawn at once,
    logits in float32, a mask, and lists of some thousand entries.
    """
    drawn = min(max_seqs, 64)
    mask = 4 * -(-vocab // 32)
    return max_seqs * (4 * vocab + mask + 8) + drawn * (4 * vocab + mask + 2**15)


def cache_of(
    config: ModelConfig,
    item_bytes: int,
    settings: InferenceSettings,
    device: str,
    max_seq_len: int | None = None,
) -> Cache:
    """Return what the cache of a model is asked to hold; max_seq_len is what the deployment promises."""
    sizes = settings.sizes(device)
    return Cache(
        groups=cache_entries(config, item_bytes, rounded=settings.kv_cache_dtype != "auto"),
        block_size=settings.block_size,
        longest=min(max_seq_len or config.max_positions, config.max_positions),
        seqs=sizes.seqs,
        rows=sizes.tokens,
        whole=max_seq_len is not None,
        kv_bytes=int(settings.kv_memory_gb * GB) if settings.kv_memory_gb else None,
        state_bytes=config.state_bytes(item_bytes),
        every_seat=settings.max_batch_seqs is not None,
        snapshots=settings.prefix_cache,
    )


def adapter_bytes(config: ModelConfig, item_bytes: int, rank: int) -> int:
    """Return what an adapter takes that has this rank in every module of every layer, experts aside.

    Few adapters have experts, and those that do take a hundred times as much.
    """
    groups = [group for group in _every_group(config) if group.expert is None]
    features = sum(len(group.modules) * group.in_features + sum(group.out_features) for group in groups)
    return item_bytes * rank * features


def plan_bank(
    sizes: Collection[int], free: int, settings: InferenceSettings, device: str, *, usual: int
) -> int:
    """Return the bytes of the bank that holds resident adapters.

    What the settings say; else room for all that are registered and some that will be, up to a share of what is
    free once weights are loaded. The largest adapter fits in either case.

    Args:
        sizes: what each registered adapter takes.
        free: bytes of the device that weights leave.
        settings: those of the replica.
        device: cpu or cuda.
        usual: what an adapter takes that nobody knows yet.

    Raises:
        ResourcesExhausted: the largest adapter does not fit what the settings say, or what is free.
    """
    largest = max(sizes, default=0)
    if settings.adapter_memory_gb is None:
        usual_bytes = sum(sizes) * 5 // 4 + BANK_ROOM * max(largest, usual)
        bank_bytes = max(largest + ALIGNING, min(usual_bytes, int(BANK_SHARE[device] * free)))
    else:
        bank_bytes = int(settings.adapter_memory_gb * GB)
    if largest > bank_bytes or bank_bytes > free:
        raise ResourcesExhausted(
            f"the bank of adapters has {bank_bytes / 1e6:,.1f} MB of the {free / 1e6:,.1f} MB that weights "
            f"leave, and the largest adapter takes {largest / 1e6:,.1f} MB. Set LORAMUX_ADAPTER_MEMORY_GB "
            "to a value between them."
        )
    return bank_bytes


def buckets(max_seqs: int) -> Iterator[int]:
    """Yield the numbers of rows that decode steps are made for: 1, 2, 4, 8, 16, 24, ... up to max_seqs."""
    yield from (size for size in (1, 2, 4, *range(8, max_seqs, 8)) if size < max_seqs and size != 0)
    yield max_seqs


def blend_buckets(max_seqs: int) -> list[int]:
    """Return those of `buckets` that steps with blends have: few, for few steps have any."""
    return [*(size for size in BLEND_ROWS if size < max_seqs), max_seqs]


def mixed_buckets(max_tokens: int) -> Iterator[int]:
    """Yield those of steps with prompts: 16, 32, multiples of 64, and from 256 on steps of an eighth at most.

    So a step of more than 256 rows computes at most an eighth more than it was asked for.
    """
    size = SMALLEST_MIXED
    while size < max_tokens:
        yield size
        if size < FINE_MIXED:
            size += min(size, 64)
        else:
            size += min(128, (1 << size.bit_length() - 1) // 8)
    yield max_tokens


def _every_group(config: ModelConfig) -> Iterator[GroupShape]:
    """Yield the fused linears of all layers."""
    return chain.from_iterable(config.layer_groups)


def _each(cache: Cache) -> str:
    states = f", with {cache.seqs} sequences' states of {cache.state_bytes} bytes" if cache.state_bytes else ""
    return f"{cache.token_bytes} bytes a token{states}"


def _described(needs: Needs) -> str:
    return f"{needs.weights / GB:.2f} GB of weights and {needs.adapters / GB:.2f} GB of adapters"


def _size(count: int) -> str:
    return f"{count / GB:.1f} GB" if count >= GB else f"{count / 1e6:.1f} MB"
