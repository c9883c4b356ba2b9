"""Which replica gets a request: the one that a model belongs to, while it has no more to do than others.

Each model ranks the replicas by a hash of both names, so every door ranks them alike without being told, an
adapter is loaded where its requests go, and a replica that comes or goes moves those models alone that it gets
or had.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

BOUND: Final = 1.25
"""A replica passes a model's request on when it has so many times what replicas have on average ..."""
FREE: Final = 8
"""... and more than this: as long as there is little to do, a model stays where it is."""


class AffineRouter(RequestRouter):
    """Ray's `multiplexed_model_id` is the model; requests without one go to the less busy of two."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return groups of replicas in the order in which they are tried; of a group the least busy one is."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        model = pending_request.metadata.multiplexed_model_id if pending_request else ""
        if not model:
            two = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
            return [two, candidate_replicas]
        ranked = sorted(candidate_replicas, key=lambda each: rank(model, each.replica_id.unique_id))
        loads = [self.replica_queue_len_cache.get(each.replica_id) or 0 for each in ranked]
        return [[ranked[index]] for index in order(loads)]


def rank(model: str, replica: str) -> bytes:
    """Return a number that is drawn for a model and a replica; the smallest is the model's first choice."""
    return blake2b(f"{model}\0{replica}".encode(), digest_size=8).digest()


def order(loads: Sequence[int]) -> list[int]:
    """Return in which order ranked replicas are tried: by rank, those beyond the bound last."""
    bound = max(FREE, BOUND * (sum(loads) + 1) / max(1, len(loads)))
    return sorted(range(len(loads)), key=lambda index: (loads[index] > bound, index))
