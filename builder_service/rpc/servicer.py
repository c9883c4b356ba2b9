"""BuilderService over gRPC: each method is a call of `Builds` or `Checks`, and a translation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

import grpc

from builder_service.builds.builds import Builds
from builder_service.builds.views import BuildState
from builder_service.pipeline.check import Checks
from builder_service.pipeline.progress import AdapterProgress
from builder_service.rpc.mapping import (
    checked_deployment,
    deployment_message,
    generation_message,
    parts_of,
    pushed_message,
    report_message,
    update_of,
)
from loramux.builder.v1 import builder_pb2 as pb, builder_pb2_grpc
from loramux.messages import deployment_from_message

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["BuilderService"].full_name


class BuilderServicer(builder_pb2_grpc.BuilderServiceServicer):
    """The gRPC servicer of builds; loramux_shared.rpc.server turns its faults into statuses."""

    def __init__(self, builds: Builds, checks: Checks) -> None:
        self._builds = builds
        self._checks = checks

    def register(self, server: grpc.aio.Server) -> None:
        """Add the service to a server."""
        builder_pb2_grpc.add_BuilderServiceServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    async def BuildDeployment(  # noqa: N802 - the rpc's name
        self, request: pb.BuildDeploymentRequest, context: grpc.aio.ServicerContext
    ) -> pb.BuildDeploymentResponse:
        """Accept a build."""
        del context
        deployment = deployment_from_message(request.deployment)
        view = await self._builds.build(
            deployment, request.request_id, verify=request.verify, exact=request.exact
        )
        return pb.BuildDeploymentResponse(deployment=deployment_message(view))

    async def UpdateDeployment(  # noqa: N802 - the rpc's name
        self, request: pb.UpdateDeploymentRequest, context: grpc.aio.ServicerContext
    ) -> pb.UpdateDeploymentResponse:
        """Accept an update."""
        del context
        view = await self._builds.update(update_of(request), request.request_id)
        return pb.UpdateDeploymentResponse(deployment=deployment_message(view))

    async def RollbackDeployment(  # noqa: N802 - the rpc's name
        self, request: pb.RollbackDeploymentRequest, context: grpc.aio.ServicerContext
    ) -> pb.RollbackDeploymentResponse:
        """Publish an older generation's content."""
        del context
        to, expected = request.to or None, request.expected_generation or None
        result = await self._builds.rollback(request.name, to, expected)
        return pb.RollbackDeploymentResponse(
            generation=result.generation.number, unchanged=result.unchanged, restored=result.restored
        )

    async def ListGenerations(  # noqa: N802 - the rpc's name
        self, request: pb.ListGenerationsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListGenerationsResponse:
        """Return a page of generations."""
        del context
        found = await self._builds.history(request.name, request.page_size, request.page_token)
        return pb.ListGenerationsResponse(
            generations=map(generation_message, found.views), next_page_token=found.next_token
        )

    async def PutAdapter(  # noqa: N802 - the rpc's name
        self, requests: AsyncIterator[pb.PutAdapterRequest], context: grpc.aio.ServicerContext
    ) -> pb.PutAdapterResponse:
        """Take a pushed adapter."""
        del context
        return pushed_message(await self._builds.pushes.put(parts_of(requests)))

    async def GetDeployment(  # noqa: N802 - the rpc's name
        self, request: pb.GetDeploymentRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetDeploymentResponse:
        """Return a deployment."""
        del context
        view = await self._builds.get(request.name)
        return pb.GetDeploymentResponse(deployment=deployment_message(view))

    async def ListDeployments(  # noqa: N802 - the rpc's name
        self, request: pb.ListDeploymentsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListDeploymentsResponse:
        """Return a page of deployments."""
        del context
        page = await self._builds.list(request.page_size, request.page_token)
        return pb.ListDeploymentsResponse(
            deployments=map(deployment_message, page.views), next_page_token=page.next_token
        )

    async def WatchDeployment(  # noqa: N802 - the rpc's name
        self, request: pb.WatchDeploymentRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WatchDeploymentResponse]:
        """Stream a deployment's states."""
        del context
        known: Mapping[str, AdapterProgress] = {}
        async for view in self._builds.watch(
            request.name, follow=request.follow, request_id=request.request_id
        ):
            visible = view
            if request.changes_only:
                changed = tuple(each for each in view.adapters if known.get(each.name) != each)
                # The next build in a stream that continues starts from its first event.
                known = {each.name: each for each in view.adapters if view.state is BuildState.BUILDING}
                visible = replace(view, adapters=changed)
            yield pb.WatchDeploymentResponse(deployment=deployment_message(visible))

    async def CancelBuild(  # noqa: N802 - the rpc's name
        self, request: pb.CancelBuildRequest, context: grpc.aio.ServicerContext
    ) -> pb.CancelBuildResponse:
        """Ask a build to end."""
        del context
        view = await self._builds.cancel(request.name)
        return pb.CancelBuildResponse(deployment=deployment_message(view))

    async def CheckAdapter(  # noqa: N802 - the rpc's name
        self, request: pb.CheckAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.CheckAdapterResponse:
        """Check an adapter."""
        del context
        report = await self._checks.check(checked_deployment(request))
        return pb.CheckAdapterResponse(report=report_message(report))
