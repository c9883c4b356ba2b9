"""The choice of a replica for a request: the rule of `placement`, in Ray's terms.

Every proxy orders the replicas of a model alike without coordination, so an adapter is loaded where its
requests go, and a replica that comes or goes moves those models alone that it gets or had.
"""

import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from loramux_ray import placement


class AffineRouter(RequestRouter):
    """Ray's `multiplexed_model_id` is the model; requests without one go to the less busy of two."""

    def initialize_state(self, **_: Any) -> None:
        """Know nothing yet of how much models are asked for."""
        self._popularity = placement.Popularity()
        self._spot = random.random()  # noqa: S311 - spreads proxies, guards nothing

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
        named = {each.replica_id.unique_id: each for each in candidate_replicas}
        loads = {name: self.replica_queue_len_cache.get(each.replica_id) or 0 for name, each in named.items()}
        ordered = placement.order(model, tuple(sorted(named)))
        copies = self._popularity.copies(model, len(ordered))
        first = placement.choose(ordered, loads.__getitem__, sum(loads.values()), copies, self._spot)
        return [[named[first]], *([named[name]] for name in ordered if name != first)]
