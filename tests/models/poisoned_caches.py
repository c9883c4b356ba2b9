"""Caches that hold NaN where no sequence and no known prefix has anything."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inference_service.core.sequence import Batch
from inference_service.engine.engine import Engine
from inference_service.engine.execution.runner import Pending, Runner
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.startup.engine import build_engine, runner_of
from loramux_shared.bases.layers import AttentionLayer
from loramux_shared.storage.base import Store
from tests.support.tiny import Replica, World

Build = Callable[..., tuple[Engine, SchedulerLimits]]
"""Builds an engine as `build_engine` does."""


def load_poisoned(world: World, store: Store, build: Build = build_engine, **settings: Any) -> Replica:
    """Load a replica whose unused blocks, slots of states and workspaces are NaN around every later step."""
    loaded: list[Replica] = []

    def new_runner(*arguments: Any) -> Runner:
        runner = runner_of(*arguments)
        submit = runner.submit

        @torch.inference_mode()
        def submit_poisoned(batch: Batch) -> Pending:
            for replica in loaded:
                _fill_blocks(replica, runner, batch)
                for workspace in _workspaces(replica.lora):
                    workspace.fill_(torch.nan)
            pending = submit(batch)
            for replica in loaded:
                _fill_states(replica, runner)
            return pending

        runner.submit = submit_poisoned  # type: ignore[method-assign]
        return runner

    loaded.append(world.load(store, build=partial(build, new_runner=new_runner), **settings))
    return loaded[0]


def _fill_blocks(replica: Replica, runner: Runner, batch: Batch) -> None:
    config, found = replica.base.config, replica.core.inspect()
    for group, use in enumerate(found.blocks):
        unused = set(use.free)
        for chunk in batch.chunks:
            first = -(-chunk.start // found.stats.block_size)
            unused |= {block for block in chunk.seq.progress.tables[group][first:] if block >= 0}
        index = torch.tensor(sorted(unused), dtype=torch.int64)
        blocks = len(use.held) + len(use.cached) + len(use.free)
        for layer, cache in zip(config.layers, runner.cache.layers, strict=True):
            mixer = layer.mixer
            if cache and isinstance(mixer, AttentionLayer) and mixer.attention.window == config.windows[group]:
                # keys and values, of each head block by block; of 8 bits their scales
                for tensor in cache if len(cache) == 2 else [cache[2].flatten(0, 1)]:
                    tensor.view(len(tensor), blocks, -1)[:, index] = torch.nan


def _fill_states(replica: Replica, runner: Runner) -> None:
    use = replica.core.inspect().states
    if use is not None:
        free = torch.tensor(sorted(use.free), dtype=torch.int64)
        for state in sum(runner.cache.states, ()):
            state[free] = torch.nan


def _workspaces(lora: Any) -> Iterable[Tensor]:
    yield getattr(lora, "_workspace", torch.empty(0))
    yield from getattr(lora, "_workspaces", {}).values()
