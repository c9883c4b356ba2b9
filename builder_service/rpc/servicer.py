"""The builder's gRPC service, and the map from the pipeline's values to its messages; protobuf ends here."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Final

import grpc
from pydantic import ValidationError

from builder_service.builds.builds import Builds
from builder_service.builds.pages import GenerationView
from builder_service.builds.pushes import Pushed, PushedChunk, Upload
from builder_service.builds.views import BuildState, DeploymentView
from builder_service.pipeline.check import ADAPTER, CheckedReport, Checks
from builder_service.pipeline.progress import AdapterProgress
from builder_service.pipeline.update import Update
from loramux.builder.v1 import builder_pb2 as pb, builder_pb2_grpc
from loramux.messages import (
    DTYPES,
    adapters_from_message,
    deployment_from_message,
    finding_to_message,
    message_of,
    repository_to_message,
)
from loramux_shared.bundle.manifest import ModuleRow
from loramux_shared.deployment import Deployment
from loramux_shared.deployment_file import findings_of
from loramux_shared.faults import DeploymentInvalid, RequestInvalid
from loramux_shared.rpc.status import Context
from loramux_shared.wording import SANE_ID

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["BuilderService"].full_name


class BuilderServicer(builder_pb2_grpc.BuilderServiceServicer):
    """The gRPC servicer of builds; loramux_shared.rpc.server turns its faults into statuses."""

    def __init__(self, builds: Builds, checks: Checks) -> None:
        self._builds = builds
        self._checks = checks

    def register(self, server: grpc.aio.Server) -> None:
        """Add the service to a server."""
        builder_pb2_grpc.add_BuilderServiceServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    async def BuildDeployment(
        self, request: pb.BuildDeploymentRequest, _: Context
    ) -> pb.BuildDeploymentResponse:
        """Accept a build."""
        deployment = deployment_from_message(request.deployment)
        view = await self._builds.build(
            deployment, _request_id(request), verify=request.verify, exact=request.exact
        )
        return pb.BuildDeploymentResponse(deployment=deployment_message(view))

    async def UpdateDeployment(
        self, request: pb.UpdateDeploymentRequest, _: Context
    ) -> pb.UpdateDeploymentResponse:
        """Accept an update."""
        view = await self._builds.update(update_of(request), _request_id(request))
        return pb.UpdateDeploymentResponse(deployment=deployment_message(view))

    async def RollbackDeployment(
        self, request: pb.RollbackDeploymentRequest, _: Context
    ) -> pb.RollbackDeploymentResponse:
        """Publish an older generation's content."""
        to, expected = request.to or None, request.expected_generation or None
        result = await self._builds.rollback(request.name, to, expected)
        return pb.RollbackDeploymentResponse(
            generation=result.generation.number, unchanged=result.unchanged, restored=result.restored
        )

    async def ListGenerations(
        self, request: pb.ListGenerationsRequest, _: Context
    ) -> pb.ListGenerationsResponse:
        """Return a page of generations."""
        found = await self._builds.history(request.name, request.page_size, request.page_token)
        return pb.ListGenerationsResponse(
            generations=map(generation_message, found.items), next_page_token=found.next_token
        )

    async def PutAdapter(
        self, requests: AsyncIterator[pb.PutAdapterRequest], _: Context
    ) -> pb.PutAdapterResponse:
        """Take a pushed adapter."""
        return pushed_message(await self._builds.pushes.put(parts_of(requests)))

    async def GetDeployment(self, request: pb.GetDeploymentRequest, _: Context) -> pb.GetDeploymentResponse:
        """Return a deployment."""
        view = await self._builds.get(request.name)
        return pb.GetDeploymentResponse(deployment=deployment_message(view))

    async def ListDeployments(
        self, request: pb.ListDeploymentsRequest, _: Context
    ) -> pb.ListDeploymentsResponse:
        """Return a page of deployments."""
        page = await self._builds.list(request.page_size, request.page_token)
        return pb.ListDeploymentsResponse(
            deployments=map(deployment_message, page.items), next_page_token=page.next_token
        )

    async def WatchDeployment(
        self, request: pb.WatchDeploymentRequest, _: Context
    ) -> AsyncIterator[pb.WatchDeploymentResponse]:
        """Stream a deployment's states."""
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

    async def CancelBuild(self, request: pb.CancelBuildRequest, _: Context) -> pb.CancelBuildResponse:
        """Ask a build to end."""
        view = await self._builds.cancel(request.name)
        return pb.CancelBuildResponse(deployment=deployment_message(view))

    async def CheckAdapter(self, request: pb.CheckAdapterRequest, _: Context) -> pb.CheckAdapterResponse:
        """Check an adapter."""
        report = await self._checks.check(checked_deployment(request))
        return pb.CheckAdapterResponse(report=report_message(report))


MAX_OTHERS: Final = 1000
"""Names of files that are not sent of a pushed adapter."""


def deployment_message(view: DeploymentView) -> pb.Deployment:
    """Return a deployment as a message."""
    return message_of(
        pb.Deployment,
        view,
        state=f"STATE_{view.state}",
        adapters=map(_adapter_message, view.adapters),
        failure=view.failure
        and message_of(pb.Failure, view.failure, findings=map(finding_to_message, view.failure.findings)),
    )


def _request_id(request: pb.BuildDeploymentRequest | pb.UpdateDeploymentRequest) -> str:
    """Return the id of a request, of which thousands are remembered; raise RequestInvalid for an odd one."""
    if request.request_id and not SANE_ID.fullmatch(request.request_id):
        expected = "1 to 128 letters, digits, _, ., : or -, as a UUID has"
        raise RequestInvalid.of_field(
            "the request is not valid", "request_id", expected, repr(request.request_id[:64])
        )
    return request.request_id


def update_of(request: pb.UpdateDeploymentRequest) -> Update:
    """Return the requested update; raise DeploymentInvalid with one finding per violation."""
    add = adapters_from_message(request.add)
    fields = {"name": request.name, "add": add, "remove": tuple(request.remove)}
    judged = {"expected_generation": request.expected_generation or None, "must_be_new": request.must_be_new}
    try:
        return Update.model_validate(fields | judged)
    except ValidationError as error:
        raise DeploymentInvalid("the update is not valid", findings_of(error, Update)) from error


async def parts_of(requests: AsyncIterator[pb.PutAdapterRequest]) -> AsyncIterator[Upload | PushedChunk]:
    """Yield what an upload consists of; raise RequestInvalid for a message without upload and chunk."""
    async for request in requests:
        match request.WhichOneof("part"):
            case "upload":
                sent, others = request.upload, tuple(request.upload.other_files[:MAX_OTHERS])
                yield Upload(sent.deployment, sent.name, sent.config, sent.expected_generation or None, others)
            case "chunk":
                yield PushedChunk(request.chunk.file, request.chunk.data)
            case _:
                raise RequestInvalid("PutAdapter: expected an upload or a chunk in a message, found neither.")


def pushed_message(pushed: Pushed) -> pb.PutAdapterResponse:
    """Return what came of a push as a message."""
    return pb.PutAdapterResponse(
        digest=pushed.record.digest,
        generation=pushed.result.generation.number,
        unchanged=pushed.result.unchanged,
        adapter=_adapter_message(pushed.adapter),
    )


def generation_message(view: GenerationView) -> pb.Generation:
    """Return a generation as a message."""
    changes = [
        pb.AdapterChange(name=change.name, digest=change.digest, digest_before=change.before)
        for change in view.changes
    ]
    return message_of(pb.Generation, view, changes=changes)


def checked_deployment(request: pb.CheckAdapterRequest) -> Deployment:
    """Return a deployment of the one adapter that is to be checked, as `deployment_from_message` does."""
    spec = pb.DeploymentSpec(
        model_name="check",
        base=request.base,
        adapters=[pb.Adapter(name=ADAPTER, repository=request.adapter)],
        max_lora_rank=request.max_lora_rank,
        lora_target_modules=request.lora_target_modules,
        lora_dtype=request.lora_dtype,
        truncate_to_rank=request.truncate_to_rank,
        signed_by=request.signed_by,
    )
    return deployment_from_message(spec)


def report_message(report: CheckedReport) -> pb.AdapterReport:
    """Return the report of a check as a message."""
    return message_of(
        pb.AdapterReport,
        report,
        adapter=repository_to_message(report.adapter),
        base=repository_to_message(report.base),
        files=[message_of(pb.AdapterFile, file, name=name) for name, file in sorted(report.files.items())],
        findings=map(finding_to_message, report.findings),
        rows=map(_row_message, report.rows),
        dtype=DTYPES[report.dtype],
        labels=report.score.label_names if report.score else (),
        problem_type=(report.score and report.score.problem_type) or "",
    )


def _row_message(row: ModuleRow) -> pb.AdapterRow:
    cut = row.truncation
    return pb.AdapterRow(
        **row.model_dump(exclude={"truncation"}),
        truncated_from=cut.rank if cut else 0,
        truncation_error=cut.error if cut else 0.0,
    )


def _adapter_message(adapter: AdapterProgress) -> pb.AdapterBuild:
    warnings = map(finding_to_message, adapter.warnings)
    return message_of(pb.AdapterBuild, adapter, stage=f"STAGE_{adapter.stage}", warnings=warnings)
