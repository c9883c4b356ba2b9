"""Operators' calls of a replica: the methods of a client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loramux.inference.v1 import adapters_pb2 as pb
from loramux.inference.v1.adapters_pb2_grpc import AdapterServiceStub
from loramux.mapping import record_of
from loramux.requests import fitted
from loramux.steps import Ask, Steps, Stream
from loramux_shared.faults import FAULTS, Fault, InternalFault
from loramux_shared.operations import AdapterStatus, ReplicaStatus

# The generated stubs have no types; what they answer is typed here.
adapter_stub: Callable[[Any], Any] = AdapterServiceStub
BUILD_TIMEOUT_S = 3600.0
"""Deadline of calls that wait for a build."""
_PAGE = 1000


def adapter_of(message: pb.AdapterState) -> AdapterStatus:
    """Return an adapter."""
    return record_of(
        AdapterStatus,
        message,
        tier=_word(pb.Tier, message.tier),
        residency=_word(pb.Residency, message.residency),
        num_bytes=message.bytes,
        last_failure=_failure(message.last_failure) if message.HasField("last_failure") else None,
    )


def replica_of(message: pb.ReplicaState) -> ReplicaStatus:
    """Return a replica."""
    return record_of(ReplicaStatus, message)


def _word(kind: Any, number: int) -> str:
    """Return the last word of an enum's value; of one that is not known here its number."""
    return kind.Name(number).rpartition("_")[2].lower() if number in kind.values() else str(number)


def _failure(message: pb.LoadFailure) -> Fault:
    return FAULTS.get(message.reason, InternalFault)(message.message)


class AdapterMethods:
    """The methods of a client for the adapters of a replica; they need a key with the scope admin."""

    timeout_s: float | None

    def adapters(self) -> Steps[list[AdapterStatus]]:
        """Return all adapters, by name."""
        found: list[AdapterStatus] = []
        token = ""
        while True:
            request = pb.ListAdaptersRequest(page_size=_PAGE, page_token=token)
            answer = yield Ask("adapters", "ListAdapters", request, self.timeout_s)
            found += map(adapter_of, answer.adapters)
            token = answer.next_page_token
            if not token:
                return found

    def adapter(self, name: str) -> Steps[AdapterStatus]:
        """Return one adapter."""
        request = fitted(pb.GetAdapterRequest, name=name)
        return adapter_of((yield Ask("adapters", "GetAdapter", request, self.timeout_s)).adapter)

    def pin(self, name: str) -> Steps[AdapterStatus]:
        """Keep a name resident, whatever version it stands for."""
        request = fitted(pb.PinAdapterRequest, name=name)
        return adapter_of((yield Ask("adapters", "PinAdapter", request, self.timeout_s)).adapter)

    def unpin(self, name: str) -> Steps[AdapterStatus]:
        """Allow a name to be evicted again."""
        request = fitted(pb.UnpinAdapterRequest, name=name)
        return adapter_of((yield Ask("adapters", "UnpinAdapter", request, self.timeout_s)).adapter)

    def load(
        self, name: str, path: str, *, replace: bool = False, timeout_s: float | None = BUILD_TIMEOUT_S
    ) -> Steps[AdapterStatus]:
        """Have an adapter built, published and served; ``bundle:DIGEST`` is loaded into this replica alone."""
        request = fitted(pb.LoadAdapterRequest, name=name, path=path, replace=replace)
        return adapter_of((yield Ask("adapters", "LoadAdapter", request, timeout_s)).adapter)

    def unload(self, name: str, *, timeout_s: float | None = BUILD_TIMEOUT_S) -> Steps[None]:
        """Remove a name; running requests end on the version that they began with."""
        yield Ask("adapters", "UnloadAdapter", fitted(pb.UnloadAdapterRequest, name=name), timeout_s)

    def rollback_replica(
        self, to: int | None = None, *, timeout_s: float | None = BUILD_TIMEOUT_S
    ) -> Steps[int]:
        """Publish an older generation again; returns its new number once this replica serves it."""
        answer = yield Ask("adapters", "RollbackReplica", fitted(pb.RollbackReplicaRequest, to=to), timeout_s)
        return int(answer.generation)

    def replica(self) -> Steps[ReplicaStatus]:
        """Return the state of the replica."""
        return replica_of((yield Ask("adapters", "GetReplica", pb.GetReplicaRequest(), self.timeout_s)).replica)

    def watch_replica(self, *, timeout_s: float | None = None) -> Stream[ReplicaStatus]:
        """Stream the state of the replica: now, then every change."""
        request = pb.WatchReplicaRequest()
        return Stream(
            "adapters", "WatchReplica", request, timeout_s, lambda message: replica_of(message.replica)
        )
