"""The draft model of a replica, from its start on."""

from collections.abc import Callable
from typing import Any, Final

import structlog

from inference_service.engine.execution.drafts.choice import DraftChoice
from inference_service.engine.execution.drafts.model import DraftModel
from inference_service.engine.execution.runner import Runner
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.startup.base import LoadedBase, load_base
from loramux_shared.bases.memory import GB, cache_of, weights_bytes
from loramux_shared.bundle.generation import Generation
from loramux_shared.faults import SettingsInvalid
from loramux_shared.process import report
from loramux_shared.runtime import Rounding
from loramux_shared.settings import InferenceSettings
from loramux_shared.sources.open import Sources

log = structlog.get_logger()

LEAST_BLOCKS: Final = 64
"""Blocks of the draft model's cache, at least."""


def open_draft(
    settings: InferenceSettings,
    generation: Generation,
    base: LoadedBase,
    sources: Sources,
    new_runner: Callable[..., Runner],
) -> DraftChoice:
    """Load the draft model of a generation, with a cache that takes at most what its weights take.

    Raises:
        SettingsInvalid: several ranks compute the base.
        Fault: what loading a base raises.
    """
    speculator = generation.speculator
    assert speculator is not None  # noqa: S101 - it is called where there is one
    if (ranks := settings.tensor_parallel or 1) > 1:
        raise SettingsInvalid(
            f"LORAMUX_TENSOR_PARALLEL={ranks}: runtime.speculator of the deployment does not go with several "
            "ranks yet. Set 1, or LORAMUX_SPECULATIVE_TOKENS=0, which drafts nothing."
        )
    device, size = base.model.device.type, settings.block_size
    compiled = base.backend.computing.backend == "native"  # torch's operations are slower in int8
    own: dict[str, Any] = {"quantization": Rounding.INT8} if compiled else {}
    settings = settings.model_copy(update=own)
    report("loading the draft model")
    of_draft = generation.model_copy(update={"base": speculator.model, "max_seq_len": None})
    draft = load_base(of_draft, settings, sources)
    config, item_bytes = draft.config, draft.model.dtype.itemsize
    weights = weights_bytes(config, item_bytes, device, draft.backend.quantization)
    cache = cache_of(config, item_bytes, settings, device)
    num_blocks = max(LEAST_BLOCKS, weights // (cache.token_bytes * size))
    longest = min(cache.longest, num_blocks * size)
    sizes = settings.sizes(device)
    limits = SchedulerLimits(sizes.tokens, sizes.seqs, 1, longest)
    runner = new_runner(draft, draft.backend.new_lora(), num_blocks, size, limits)
    if draft.backend.recordable:
        runner.capture()
    log.info("memory", item="draft model", gb=round((weights + num_blocks * size * cache.token_bytes) / GB, 3))
    blocks = BlockManager(num_blocks, size, config.windows, prefix_cache=settings.prefix_cache)
    vocab = min(config.dims.vocab, base.config.dims.vocab)
    model = DraftModel(runner, blocks, vocab, longest)
    choice = DraftChoice(model, speculator.tokens)
    choice.warm_up()
    return choice
