"""From what the pipeline knows to messages; protobuf ends here."""

from __future__ import annotations

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from builder_service.builds.views import DeploymentView
from builder_service.pipeline.check import ADAPTER, AdapterReport
from builder_service.pipeline.progress import AdapterProgress
from loramux.builder.v1 import builder_pb2 as pb
from loramux.messages import (
    DTYPES,
    deployment_from_message,
    finding_to_message,
    repository_to_message,
)
from loramux_shared.bundle.manifest import Row
from loramux_shared.deployment import Deployment
from loramux_shared.faults import Fault


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
    )
    return deployment_from_message(spec)


def report_message(report: AdapterReport) -> pb.AdapterReport:
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
    )


def _row_message(row: Row) -> pb.AdapterRow:
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
    )


def _failure_message(fault: Fault) -> pb.Failure:
    return pb.Failure(
        reason=fault.reason, message=fault.message, findings=map(finding_to_message, fault.findings)
    )


def _timestamp(moment: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(moment)
    return message
