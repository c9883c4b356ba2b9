"""Pooling of hidden states into the one vector of a sequence: running sums, and copies that no step
waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence as Seq
from typing import Final, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from inference_service.core.sequence import Sequence, Vector
from inference_service.engine.rows import PooledRows
from inference_service.engine.transfer import mark, to_host
from loramux_shared.runtime import Pooling

Vectors: TypeAlias = list[tuple[Sequence, Vector]]
_sums: Final[WeakKeyDictionary[Sequence, Tensor]] = WeakKeyDictionary()
"""Sums of hidden states [hidden size], of the sequences whose mean is asked for; on the device."""


def pool(chunks: Iterable[PooledRows], hidden: Seq[Tensor]) -> Callable[[], Vectors]:
    """Take in the hidden states [n, hidden size] of each chunk; the result waits for the vectors that end.

    Sums are float64, so that neither the chunks of a prompt nor a preemption show in a mean.
    """
    seqs: list[Sequence] = []
    vectors: list[Tensor] = []
    for (seq, rows, ends), states in zip(chunks, hidden, strict=True):
        if seq.pooling is Pooling.MEAN:
            total, before = states.sum(0, dtype=torch.float64), _sums.get(seq)
            _sums[seq] = total = total if before is None else before + total
            seq.progress.num_pooled += len(rows)
            states = (total / seq.progress.num_pooled)[None]
        if ends:
            seqs.append(seq)
            vectors.append(states[-1].float())
    if not seqs:
        return list
    copied = to_host(torch.stack(vectors))
    done = mark(copied, vectors[0].device)
    return lambda: list(zip(seqs, done().numpy(), strict=True))
