"""The gRPC API for operators' calls about adapters."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Final

import grpc

from inference_service.adapters.manager import AdapterManager
from loramux.inference.v1 import adapters_pb2 as pb, adapters_pb2_grpc
from loramux.messages import message_of
from loramux_shared.operations import AdapterStatus, ReplicaStatus
from loramux_shared.rpc.status import Context

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["AdapterService"].full_name


class AdapterServicer(adapters_pb2_grpc.AdapterServiceServicer):
    """Translates messages and nothing else; faults become statuses in the server's interceptor."""

    def __init__(self, adapters: AdapterManager) -> None:
        self._adapters = adapters

    def register(self, server: grpc.aio.Server) -> None:
        """Add the service to a server."""
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    async def ListAdapters(self, request: pb.ListAdaptersRequest, _: Context) -> pb.ListAdaptersResponse:
        """List adapters by name."""
        page = self._adapters.list(request.page_token, request.page_size)
        adapters = map(adapter_message, page.adapters)
        return pb.ListAdaptersResponse(adapters=adapters, next_page_token=page.next_page)

    async def GetAdapter(self, request: pb.GetAdapterRequest, _: Context) -> pb.GetAdapterResponse:
        """Return one adapter."""
        return pb.GetAdapterResponse(adapter=adapter_message(self._adapters.get(request.name)))

    async def PinAdapter(self, request: pb.PinAdapterRequest, _: Context) -> pb.PinAdapterResponse:
        """Keep a name resident."""
        return pb.PinAdapterResponse(adapter=adapter_message(self._adapters.pin(request.name)))

    async def UnpinAdapter(self, request: pb.UnpinAdapterRequest, _: Context) -> pb.UnpinAdapterResponse:
        """Let a name leave."""
        return pb.UnpinAdapterResponse(adapter=adapter_message(self._adapters.unpin(request.name)))

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, _: Context) -> pb.LoadAdapterResponse:
        """Add an adapter, or give a name another version."""
        loaded = await self._adapters.load(request.name, request.path, replace=request.replace)
        return pb.LoadAdapterResponse(adapter=adapter_message(loaded.adapter), everywhere=loaded.everywhere)

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, _: Context) -> pb.UnloadAdapterResponse:
        """Take a name away."""
        return pb.UnloadAdapterResponse(generation=await self._adapters.unload(request.name))

    async def RollbackReplica(
        self, request: pb.RollbackReplicaRequest, _: Context
    ) -> pb.RollbackReplicaResponse:
        """Have an older generation published again."""
        to = request.to if request.HasField("to") else None
        return pb.RollbackReplicaResponse(generation=await self._adapters.roll_back(to))

    async def GetReplica(self, _request: pb.GetReplicaRequest, _: Context) -> pb.GetReplicaResponse:
        """Return the state of the replica."""
        return pb.GetReplicaResponse(replica=replica_message(self._adapters.replica()))

    async def WatchReplica(
        self, _request: pb.WatchReplicaRequest, _: Context
    ) -> AsyncIterator[pb.WatchReplicaResponse]:
        """Say how the replica is, again at every change."""
        async with aclosing(self._adapters.watch()) as views:
            async for view in views:
                yield pb.WatchReplicaResponse(replica=replica_message(view))


def adapter_message(view: AdapterStatus) -> pb.AdapterState:
    """Return an adapter as a message."""
    return message_of(
        pb.AdapterState,
        view,
        tier=f"TIER_{view.tier.upper()}",
        residency=f"RESIDENCY_{view.residency.upper()}",
        bytes=view.num_bytes,
        last_failure=message_of(pb.LoadFailure, view.last_failure) if view.last_failure else None,
    )


def replica_message(view: ReplicaStatus) -> pb.ReplicaState:
    """Return a replica as a message."""
    return message_of(pb.ReplicaState, view)
