"""Executes a batch: tensors here, no policy."""

from __future__ import annotations

import torch

from inference_service.core.batch import Batch
from inference_service.core.sequence import Sequence, Token
from inference_service.engine.sampler import sample
from inference_service.kernels.attention import Context
from inference_service.lora.backend import LoraBackend
from inference_service.lora.segments import arrange
from inference_service.models.decoder import Decoder


class Runner:
    """Runs batches through a model and its cache."""

    def __init__(self, model: Decoder, lora: LoraBackend, num_blocks: int, block_size: int) -> None:
        self._model = model
        self._lora = lora
        self._block_size = block_size
        self._cache = model.new_cache(num_blocks * block_size)

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[tuple[Sequence, Token]]:
        """Compute a batch; return the new token of every sequence whose last row was in it."""
        arrangement = arrange(batch)
        tokens: list[int] = []
        positions: list[int] = []
        contexts: list[Context] = []
        sampled: list[Sequence] = []
        last_rows: list[int] = []
        for chunk in arrangement.chunks:
            contexts.append(Context(len(tokens), chunk.length, chunk.seq.blocks, chunk.end))
            tokens += chunk.seq.tokens[chunk.start : chunk.end]
            positions += range(chunk.start, chunk.end)
            if chunk.samples:
                sampled.append(chunk.seq)
                last_rows.append(len(tokens) - 1)
        model, device = self._model, self._model.device
        attention = model.attention(contexts, self._block_size)
        lora = self._lora if arrangement.segments else None
        if lora:
            lora.begin(arrangement)
        logits = model.forward(
            torch.tensor(tokens, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(last_rows, dtype=torch.int64, device=device),
            attention,
            self._cache,
            lora,
        )
        return list(zip(sampled, sample(logits, sampled), strict=True)) if sampled else []
