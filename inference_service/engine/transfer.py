"""Between host and device: copies that nobody waits for, and tokens that are waited for when they are read."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from inference_service.core.sequence import Sequence, Token
from inference_service.engine.logprobs import scores, tokens_of
from inference_service.engine.sampler import sample, shapes


def to_device(values: Seq[int], device: torch.device) -> Tensor:
    """Return numbers as int64 on the device, by pinned memory, which is kept until they are there."""
    host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Return a copy in the host's memory; it is complete when the device has done what it was given so far."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def read_back(logits: Tensor, ids: Tensor, seqs: Seq[Sequence]) -> Callable[[], list[Token]]:
    """Begin to copy the tokens ids [>= N] that were drawn from logits [N, vocab]; the result waits for them.

    Where a request shapes its logits, its token is drawn here, which waits for the step, and goes to ids too.
    """
    tokens = _draw_shaped(logits, ids, seqs)
    counts: dict[int, list[int]] = {}
    for row, seq in enumerate(seqs):
        if row not in tokens and seq.sampling.logprobs is not None:
            counts.setdefault(seq.sampling.logprobs, []).append(row)
    drawn = to_host(ids[: len(seqs)])
    scored = []
    for count, rows in counts.items():
        index = to_device(rows, ids.device)
        parts = scores(logits.index_select(0, index), ids.index_select(0, index), count)
        scored.append((rows, [to_host(part) for part in parts]))
    done = _mark(ids.device)

    def wait() -> list[Token]:
        done()
        for rows, parts in scored:
            tokens.update(zip(rows, tokens_of(parts), strict=True))
        return [tokens.get(row) or Token(token) for row, token in enumerate(drawn.tolist())]

    return wait


def _draw_shaped(logits: Tensor, ids: Tensor, seqs: Seq[Sequence]) -> dict[int, Token]:
    rows = [row for row, seq in enumerate(seqs) if shapes(seq)]
    tokens = sample(logits[rows], [seqs[row] for row in rows]) if rows else []
    for row, token in zip(rows, tokens, strict=True):
        ids[row] = token.id
    return dict(zip(rows, tokens, strict=True))


def _mark(device: torch.device) -> Callable[[], None]:
    """Return what waits until the device has done what was given to it up to now."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    event.record()
    return event.synchronize
