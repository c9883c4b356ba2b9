"""Faults as statuses of the rich error model, in both directions.

Source of the details: https://google.aip.dev/193 and google/rpc/error_details.proto.
"""

from dataclasses import dataclass, field
from typing import Final, TypeAlias

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from loramux_shared.faults import FAULTS, DeadlineExceeded, Fault, Finding, InternalFault, ServerUnavailable
from loramux_shared.wording import MAX_FINDINGS

Context: TypeAlias = grpc.aio.ServicerContext
_CLOSED: Final = (
    "it closed the connection. Where it asks clients for a certificate, set LORAMUX_CLIENT_CERT and "
    "LORAMUX_CLIENT_KEY to one that its authority signed."
)
_TLS: Final = (
    ("certificate has expired", "its certificate has expired. Renew it there, or set this machine's clock."),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "its certificate is not signed by an authority that is trusted here. Name the file of the right one: "
        "LORAMUX_TLS_CA=ca.pem.",
    ),
    (
        "Hostname Verification Check failed",
        "its certificate is for other names. Use a name that is in it, or the right server.",
    ),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS. Leave grpcs:// out, if the network to it is trusted."),
    ("Socket closed", _CLOSED),
    ("Connection reset", _CLOSED),
)


def unreachable(target: str, message: str) -> str:
    """Return the cause, in one line with its cure, of gRPC's message about an address."""
    if target.startswith("grpcs://"):
        for words, cure in _TLS:
            if words in message:
                return cure
    elif "Failed parsing HTTP/2" in message:
        return (
            "it does not speak gRPC. If that is the HTTP port: gRPC has another port, by default 50052 of an "
            "inference service and 50051 of a builder."
        )
    elif "Socket closed" in message and "Stream removed" not in message:  # the server had sent something
        return f"{message}. Does it speak TLS? Then its address is grpcs://{target}"
    return f"{message}. Is it running?"


DOMAIN = "loramux"
REPOSITORY = "repository"
"""The key of ErrorInfo's metadata that holds `Fault.repository`."""
RESET = "RST_STREAM"
"""Part of gRPC's message where a proxy lost the server behind it; no server of ours ends a call so."""
DROPPED = "CANCELLED"
"""All of gRPC's message where a call came as its server stopped, of which no code of ours hears; what a client
cancels itself has a sentence."""
# A status travels in a trailer, and clients refuse trailers above 8 KiB.
MAX_STATUS_BYTES = 6 * 1024


def status_of(fault: Fault) -> status_pb2.Status:
    """Return the status of a fault; findings that do not fit a trailer are counted in the message."""
    findings = list(fault.findings[:MAX_FINDINGS])
    while True:
        left_out = len(fault.findings) - len(findings)
        status = _status(fault, findings, f" ({left_out} more not shown)" if left_out else "")
        if not findings or status.ByteSize() <= MAX_STATUS_BYTES:
            return status
        findings = findings[: len(findings) // 2]


def _status(fault: Fault, findings: list[Finding], suffix: str) -> status_pb2.Status:
    about = {REPOSITORY: fault.repository[:512]} if fault.repository else {}
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=fault.reason, domain=DOMAIN, metadata=about)]
    if findings:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(
                field=": ".join(part for part in (item.adapter, item.where) if part),
                reason=item.code,
                description=_description(item),
            )
            for item in findings
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if fault.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(int(fault.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=fault.status.value, message=fault.message[:2048] + suffix)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _description(finding: Finding) -> str:
    bare = finding.model_copy(update={"code": "", "adapter": "", "where": ""})
    return str(bare)


async def abort(context: Context, fault: Fault) -> None:
    """End a call with the status of a fault; raises grpc's AbortError."""
    status = rpc_status.to_status(status_of(fault))
    context.set_trailing_metadata(status.trailing_metadata)
    await context.abort(status.code, status.details)


class CallFailed(Fault, status=InternalFault.status):
    """A status without a reason of ours: a cancellation, or a server that is no loramux."""

    def __init__(self, message: str, code: grpc.StatusCode) -> None:
        super().__init__(message)
        self.code = code


def fault_of(error: grpc.RpcError, target: str = "") -> Fault:
    """Return the fault that a failed call stands for.

    A status with our ErrorInfo becomes the class of its reason; a server that cannot be reached becomes
    `ServerUnavailable`, a deadline that passed here `DeadlineExceeded`, as one that the server saw pass;
    anything else `CallFailed` with grpc's code.
    """
    status = rpc_status.from_call(error)
    message = status.message if status else str(error.details())
    details = _read_details(status)
    if details.reason in FAULTS:
        return FAULTS[details.reason](message, details.findings, details.repository, details.retry_after_s)
    return _fault_of_code(error.code(), message, target)


@dataclass
class _Details:
    """The details of a status of ours."""

    reason: str = ""
    repository: str = ""
    findings: list[Finding] = field(default_factory=list)
    retry_after_s: float | None = None


def _read_details(status: status_pb2.Status | None) -> _Details:
    """Return the details of a status; those that are not ours are left out."""
    found = _Details()
    for detail in status.details if status else ():
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            found.reason, found.repository = info.reason, info.metadata.get(REPOSITORY, "")
        elif detail.Unpack(bad):
            found.findings = [
                Finding(code=item.reason, where=item.field, fix=item.description)
                for item in bad.field_violations
            ]
        elif detail.Unpack(retry):
            found.retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return found


def _fault_of_code(code: grpc.StatusCode, message: str, target: str) -> Fault:
    """Return the fault of a status that gives no reason of ours."""
    server = target or "the server"
    if code is grpc.StatusCode.INTERNAL and RESET in message:
        return ServerUnavailable(
            f"{server} ended the stream in the middle of the answer: the server behind it "
            f"stopped. Retry ({message})."
        )
    if code is grpc.StatusCode.CANCELLED and message == DROPPED:
        return ServerUnavailable(f"{server} ended when the call reached it. Retry.")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{server} did not answer before the deadline of the call. Give it more time.")
    if code is grpc.StatusCode.UNAVAILABLE:
        return ServerUnavailable(f"no answer from {server}: {unreachable(target, message)}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        message = (
            f"{server} does not have this call. A builder and an inference service are two "
            "servers, by default on 50051 and 50052; or its version is older than this one."
        )
    return CallFailed(f"{code.name}: {message}", code)
