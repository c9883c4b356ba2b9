"""The tiers of a replica's cache, one for each group of its layers."""

from collections.abc import Sequence
from pathlib import Path

import structlog
from torch import Tensor

from inference_service.engine.block_manager import BlockManager
from inference_service.engine.runner import Runner
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.layers import AttentionLayer
from loramux_shared.bases.memory import GB
from loramux_shared.faults import ResourcesExhausted, SettingsInvalid
from loramux_shared.settings import InferenceSettings
from loramux_tier.memory import BlockFile, LockedMemory, bytes_of, parts_of
from loramux_tier.tier import Slots, Tier

log = structlog.get_logger()


def open_tiers(settings: InferenceSettings, config: ModelConfig, blocks: BlockManager, runner: Runner) -> None:
    """Give every pool of a cache a tier; of each all have as many slots.

    Raises:
        SettingsInvalid: the setting does not go with others, or is less than a block.
        ResourcesExhausted: the memory, or the space on the disk, is not there.
    """
    setting = f"LORAMUX_PREFIX_HOST_GB={settings.prefix_host_gb:g}"
    if (settings.tensor_parallel or 1) > 1:
        raise SettingsInvalid(
            f"{setting} does not go with several ranks yet: set LORAMUX_TENSOR_PARALLEL=1, or 0 here."
        )
    if not settings.prefix_cache:
        raise SettingsInvalid(
            f"{setting} keeps what the prefix cache found: set LORAMUX_PREFIX_CACHE=true, or 0 here."
        )
    if blocks.states is not None:
        log.warning(
            "prefixes that leave the cache are not kept: layers of the base carry states", setting=setting
        )
        return
    groups: list[list[Tensor]] = [[] for _ in blocks.groups]
    for layer, cache in zip(config.layers, runner.cache.layers, strict=True):
        if cache and isinstance(layer.mixer, AttentionLayer):
            place = config.windows.index(layer.mixer.attention.window)
            groups[place] += parts_of(cache, blocks.groups[place].pool.num_blocks)
    count = int(settings.prefix_host_gb * GB) // sum(map(bytes_of, groups))
    if not count:
        raise SettingsInvalid(f"{setting} is less than a block of {sum(map(bytes_of, groups)):,} bytes.")
    for group, parts in zip(blocks.groups, groups, strict=True):
        group.pool.tier = Tier(_memory(parts, count, settings.cache_dir, setting))
    log.info("memory", item="tier of prefixes", gb=settings.prefix_host_gb, tokens=count * blocks.block_size)


def _memory(parts: Sequence[Tensor], count: int, folder: Path, setting: str) -> Slots:
    if parts[0].is_cuda:
        try:
            return LockedMemory(parts, count)
        except ResourcesExhausted as fault:
            raise ResourcesExhausted(
                f"{setting}: so much memory could not be locked. Lower it, or raise the limit of memory."
            ) from fault
    try:
        return BlockFile(parts, count, folder)
    except OSError as error:
        raise ResourcesExhausted(
            f"{setting}: its file could not be made in LORAMUX_CACHE_DIR={folder}: {error.strerror}. "
            "Lower it, or free space."
        ) from error
