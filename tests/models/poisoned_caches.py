"""Caches that hold NaN where no sequence and no known prefix has anything."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from inference_service.core.sequence import Batch
from inference_service.engine.execution.runner import Pending
from inference_service.startup.load import Ready


def poison(ready: Ready) -> None:
    """Fill unused blocks, slots of states and workspaces with NaN around every step from now on."""
    engine: Any = ready.engine._engine
    runner, submit = engine._runner, engine._runner.submit

    @torch.inference_mode()
    def submit_poisoned(batch: Batch) -> Pending:
        for group in range(len(engine._blocks.groups)):
            _fill_blocks(engine, group, batch)
        for workspace in _workspaces(runner._lora):
            workspace.fill_(torch.nan)
        pending: Pending = submit(batch)
        if engine._blocks.states is not None:
            free = torch.tensor(engine._blocks.states._free, dtype=torch.int64)
            for state in sum(runner.cache.states, ()):
                state[free] = torch.nan
        return pending

    runner.submit = submit_poisoned


def _fill_blocks(engine: Any, group: int, batch: Batch) -> None:
    pool, model = engine._blocks.groups[group].pool, engine._runner._model
    unused = {block for block in pool._free if block not in pool._key_of}
    for chunk in batch.chunks:
        first = -(-chunk.start // engine._blocks.block_size)
        unused |= {block for block in chunk.seq.progress.tables[group][first:] if block >= 0}
    index = torch.tensor(sorted(unused), dtype=torch.int64)
    for layer, cache in zip(model._layers, engine._runner.cache.layers, strict=True):
        if cache and layer.mixer._window == group:
            # keys and values, of each head block by block; of 8 bits their scales
            for tensor in cache if len(cache) == 2 else [cache[2].flatten(0, 1)]:
                tensor.view(len(tensor), pool.num_blocks, -1)[:, index] = torch.nan


def _workspaces(lora: Any) -> Iterable[Tensor]:
    yield getattr(lora, "_workspace", torch.empty(0))
    yield from getattr(lora, "_workspaces", {}).values()
