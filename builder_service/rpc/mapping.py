"""From what the pipeline knows to messages; protobuf ends here."""

from __future__ import annotations

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from builder_service.pipeline.progress import AdapterProgress
from builder_service.pipeline.views import DeploymentView
from loramux.builder.v1 import builder_pb2 as pb
from shared.faults import Fault
from shared.rpc.messages import finding_to_message


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
    )


def _failure_message(fault: Fault) -> pb.Failure:
    return pb.Failure(
        reason=fault.reason, message=fault.message, findings=map(finding_to_message, fault.findings)
    )


def _timestamp(moment: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(moment)
    return message
