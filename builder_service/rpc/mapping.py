"""The map from the pipeline's values to messages; protobuf ends here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import ValidationError

from builder_service.builds.pages import GenerationView
from builder_service.builds.pushes import Pushed, PushedChunk, Upload
from builder_service.builds.views import DeploymentView
from builder_service.pipeline.check import ADAPTER, CheckedReport
from builder_service.pipeline.progress import AdapterProgress
from builder_service.pipeline.update import Update
from loramux.builder.v1 import builder_pb2 as pb
from loramux.messages import (
    DTYPES,
    adapters_from_message,
    deployment_from_message,
    finding_to_message,
    repository_to_message,
)
from loramux_shared.bundle.manifest import ModuleRow
from loramux_shared.deployment import Deployment
from loramux_shared.deployment_file import findings_of
from loramux_shared.faults import DeploymentInvalid, Fault, RequestInvalid

MAX_OTHERS: Final = 1000
"""Names of files that are not sent of a pushed adapter."""


def deployment_message(view: DeploymentView) -> pb.Deployment:
    """Return a deployment as a message."""
    return pb.Deployment(
        name=view.name,
        state=f"STATE_{view.state}",
        generation=view.generation,
        create_time=_timestamp(view.create_time),
        update_time=_timestamp(view.update_time),
        adapters=map(_adapter_message, view.adapters),
        failure=None if view.failure is None else _failure_message(view.failure),
        unchanged=view.unchanged,
    )


def update_of(request: pb.UpdateDeploymentRequest) -> Update:
    """Return the update that a request asks for.

    Raises:
        DeploymentInvalid: with one finding per violation.
    """
    add = adapters_from_message(request.add)
    fields = {"name": request.name, "add": add, "remove": tuple(request.remove)}
    judged = {
        "expected_generation": request.expected_generation or None,
        "must_be_new": request.must_be_new,
    }
    try:
        return Update.model_validate(fields | judged)
    except ValidationError as error:
        raise DeploymentInvalid("the update is not valid", findings_of(error, Update)) from error


async def parts_of(requests: AsyncIterator[pb.PutAdapterRequest]) -> AsyncIterator[Upload | PushedChunk]:
    """Yield what an upload consists of.

    Raises:
        RequestInvalid: a message is neither an upload nor a chunk.
    """
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
    return pb.Generation(
        number=view.number,
        create_time=_timestamp(view.create_time) if view.create_time else None,
        served=view.served,
        adapters=view.adapters,
        changes=[
            pb.AdapterChange(name=change.name, digest=change.digest, digest_before=change.before)
            for change in view.changes
        ],
        change_count=view.change_count,
        other_settings=view.other_settings,
        damage=view.damage,
    )


def checked_deployment(request: pb.CheckAdapterRequest) -> Deployment:
    """Return a deployment of the one adapter that is to be checked.

    Raises:
        DeploymentInvalid: with one finding per violation.
    """
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
    return pb.AdapterReport(
        accepted=report.accepted,
        adapter=repository_to_message(report.adapter),
        base=repository_to_message(report.base),
        files=[
            pb.AdapterFile(name=name, size=file.size, sha256=file.sha256)
            for name, file in sorted(report.files.items())
        ],
        findings=map(finding_to_message, report.findings),
        rows=map(_row_message, report.rows),
        dtype=DTYPES[report.dtype],
        bundle_bytes=report.bundle_bytes,
        base_model_name=report.base_model_name,
        licence=report.licence,
        base_licence=report.base_licence,
        kinds=report.kinds,
        replaced_rows=report.replaced_rows,
        invocation_tokens=report.invocation_tokens,
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
    return pb.AdapterBuild(
        name=adapter.name,
        stage=f"STAGE_{adapter.stage}",
        bytes_done=adapter.bytes_done,
        bytes_total=adapter.bytes_total,
        digest=adapter.digest,
        ranks=adapter.ranks,
        modules=adapter.modules,
        tensors_used=adapter.tensors_used,
        bundle_bytes=adapter.bundle_bytes,
        warnings=map(finding_to_message, adapter.warnings),
        reused=adapter.reused,
        repaired=adapter.repaired,
        kept=adapter.kept,
        added=adapter.added,
        kinds=adapter.kinds,
    )


def _failure_message(fault: Fault) -> pb.Failure:
    return pb.Failure(
        reason=fault.reason, message=fault.message, findings=map(finding_to_message, fault.findings)
    )


def _timestamp(moment: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(moment)
    return message
