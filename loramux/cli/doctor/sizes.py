"""The memory that a base and its adapters take."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loramux_shared.bases.files import GGUF_SUFFIX
from loramux_shared.bases.formats import QUANTIZE, with_quantize
from loramux_shared.bases.hf_config import read_json
from loramux_shared.bases.memory import (
    ITEM_BYTES,
    MemoryPlan,
    adapter_bytes,
    cache_of,
    needs_of,
    plan_on,
    stays_packed,
    widening,
)
from loramux_shared.bases.read import read_fields
from loramux_shared.faults import CheckpointInvalid, ResourcesExhausted, SettingsInvalid
from loramux_shared.gguf.files import config_of
from loramux_shared.gguf.header import files_of
from loramux_shared.runtime import Rounding
from loramux_shared.settings import InferenceSettings
from loramux_shared.untrusted_json import parse_json

RANKS: Final = (8, 16, 32, 64)
CARDS: Final = (2, 4, 8, 16)
"""Numbers of GPUs that are tried where one does not suffice."""
PROCESS_BYTES: Final = 250_000_000
"""Memory of a replica on a CPU for itself: the interpreter, torch, grpc, a tokenizer, and their threads."""
TOUCHED_BYTES: Final = 8 << 20
"""The part of a layer's cache that a first step writes on a CPU: two pages of 2 MiB of keys and of values."""


@dataclass(frozen=True)
class Fit:
    """Adapters of one rank on all seven modules."""

    rank: int
    adapter_bytes: int
    adapters: int
    """Adapters that fit beside weights, steps and the cache, where settings keep the cache at its size."""


@dataclass(frozen=True)
class Sizes:
    """The memory of a base, in bytes, in the type that it would be served in."""

    dtype: str
    free_bytes: int
    weights_bytes: int
    """Bytes of the weights, without norms and biases."""
    widened: str
    """Cost of widening them at load; empty where they are served as stored, or rounded again."""
    steps_bytes: int
    """Bytes of the largest step."""
    kv_bytes: int
    """0 where it does not fit."""
    kv_tokens: int
    """Tokens that the cache holds."""
    kv_is_set: bool
    """True if a setting has its size; else it is smaller once adapters are loaded."""
    kv_token_bytes: int
    kv_dtype: str
    """Its type; empty where that is the model's."""
    kv_behind_bytes: int
    """Part of them for a token that is behind the windows of layers which have one."""
    state_bytes: int
    """Bytes of a sequence beside its tokens; 0 where no layer carries a state."""
    state_slots: int
    """For as many, snapshots of prefixes included."""
    fits: tuple[Fit, ...]
    refusal: str
    """Refusal of a replica; empty where it would start."""
    ranks: int
    """Tensor-parallel ranks with which a replica would start, each on a device with as much free: those of the
    settings if these suffice, else more; 0: no number suffices."""
    ready_bytes: int
    """Memory of a replica on a CPU when it is ready, before adapters are loaded and the cache fills."""


def read_base(path: Path) -> dict[str, Any]:
    """Return the ``config.json`` of a base: the file, or the folder that holds it, as `with_quantize` has it.

    Raises:
        CheckpointInvalid: there is none, or it is no JSON object.
    """
    if path.suffix == GGUF_SUFFIX:
        return config_of(path)
    file = path / "config.json" if path.is_dir() else path
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise CheckpointInvalid(f"{file}: expected the config.json of a checkpoint: {why}") from error
    if not isinstance(config, dict):
        raise CheckpointInvalid(f"{file}: expected a JSON object")
    return dict(with_quantize(config, read_json(file.parent / QUANTIZE)))


def weight_files_bytes(path: Path) -> int | None:
    """Return the bytes of the weights beside a config; None where there are none."""
    if path.suffix == GGUF_SUFFIX:
        return sum(part.stat().st_size for part in files_of(path))
    files = [file.stat().st_size for file in (path if path.is_dir() else path.parent).glob("*.safetensors")]
    return sum(files) if files else None


def sizes_of(
    fields: Mapping[str, Any],
    settings: InferenceSettings,
    free_bytes: int,
    dtype: str = "bfloat16",
    device: str = "cpu",
    *,
    graphs: bool = False,
    file_bytes: int | None = None,
) -> Sizes:
    """Return the sizes of a base, of which a ``config.json`` has these fields, as a replica will plan them.

    free_bytes are those of the device before anything is loaded, graphs says whether steps are recorded, and
    file_bytes are those of the base's weights, where they are there.

    Raises:
        CheckpointInvalid: the base is not served.
    """
    whole, item, ranks = read_fields(fields), ITEM_BYTES[dtype], settings.tensor_parallel or 1
    config = whole if ranks == 1 else whole.shard(ranks)
    needs = needs_of(config, item, 0, settings, device, graphs=graphs and ranks == 1)
    cache = cache_of(config, item, settings, device)
    steps, room, refusal = needs.activations + needs.graphs, 0, ""
    try:
        plan = plan_on(device, free_bytes - needs.weights, needs, cache)
        requested = min(cache.kv_bytes or plan.kv_bytes, cache.num_bytes(cache.most))
        room = free_bytes - needs.weights - steps - requested
    except ResourcesExhausted as fault:
        plan, refusal = MemoryPlan((), 0, 0, 0, 0), fault.message
        ranks = _more_ranks(fields, settings, free_bytes, dtype) if device == "cuda" else 0
    each = {rank: adapter_bytes(config, item, rank) for rank in RANKS}
    return Sizes(
        dtype=dtype,
        free_bytes=free_bytes,
        weights_bytes=needs.weights,
        widened=widening(config, file_bytes, dtype, packed=stays_packed(config, settings, device))
        if settings.rounding is Rounding.NONE
        else "",
        steps_bytes=steps,
        kv_bytes=plan.kv_bytes,
        kv_tokens=plan.tokens,
        kv_is_set=cache.kv_bytes is not None,
        kv_token_bytes=cache.token_bytes,
        kv_dtype="" if settings.kv_cache_dtype == "auto" else settings.kv_cache_dtype,
        kv_behind_bytes=cache.behind_bytes,
        state_bytes=cache.state_bytes,
        state_slots=plan.slots,
        fits=tuple(Fit(rank, size, room // size) for rank, size in each.items()),
        refusal=refusal,
        ranks=ranks,
        ready_bytes=PROCESS_BYTES + needs.weights + min(plan.kv_bytes, TOUCHED_BYTES * len(config.layers)),
    )


def _more_ranks(fields: Mapping[str, Any], settings: InferenceSettings, free_bytes: int, dtype: str) -> int:
    """Return the least number of GPUs, above that of the settings, that a base fits; 0 where none does."""
    for count in CARDS:
        if count > (settings.tensor_parallel or 1):
            more = settings.model_copy(update={"tensor_parallel": count})
            with suppress(SettingsInvalid):  # it cannot be divided so
                return sizes_of(fields, more, free_bytes, dtype, "cuda").ranks
    return 0
