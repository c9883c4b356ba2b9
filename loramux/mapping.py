"""Messages of the services as records, and the other way round; both clients stand on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TypeVar, cast

from google.protobuf.timestamp_pb2 import Timestamp

from loramux.builder.v1 import builder_pb2
from loramux.inference.v1 import inference_pb2 as pb
from loramux.records import (
    AdapterInfo,
    AdapterReport,
    Completion,
    Delta,
    DeploymentInfo,
    DeploymentState,
    Event,
    Finished,
    FinishReason,
    GenerateOptions,
    ModelInfo,
    Prompt,
    RowReport,
    Stage,
    Started,
    TokenLogprobs,
    Usage,
)
from shared.bundle.manifest import FileDigest
from shared.deployment import Dtype
from shared.faults import FAULTS, Fault, Finding, InternalFault, RequestInvalid
from shared.rpc.messages import DTYPE_NAMES, finding_from_message, repository_from_message

_E = TypeVar("_E", bound=StrEnum)


def generate_request(model: str, prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    """Return a request.

    Raises:
        RequestInvalid: an option's value does not fit its field; the findings name them all.
        TypeError: an option that does not exist.
    """
    if unknown := sorted(set(options) - set(GenerateOptions.__annotations__)):
        known = ", ".join(GenerateOptions.__annotations__)
        raise TypeError(f"unknown option {unknown[0]!r}; known are {known}")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    fields: dict[str, Any] = {"model": model, "priority": given.pop("priority", 0)}
    findings = [*_misfits(pb.GenerateRequest, fields), *_misfits(pb.SamplingParams, given)]
    try:
        fields |= _prompt(prompt)
    except (ValueError, TypeError, KeyError) as error:
        expected = "text, a list of token ids, or a list of messages with role and content"
        findings.append(Finding(code="E_BAD_FIELD", where="prompt", expected=expected, found=str(error)))
    if findings:
        raise RequestInvalid("the request cannot be sent", findings)
    return pb.GenerateRequest(**fields, sampling=pb.SamplingParams(**given))


def _misfits(kind: Callable[..., object], fields: Mapping[str, Any]) -> list[Finding]:
    findings = []
    for name, value in fields.items():
        try:
            kind(**{name: value})
        except (ValueError, TypeError) as error:
            found = repr(value)[:80]
            findings.append(Finding(code="E_BAD_FIELD", where=name, found=found, fix=str(error)))
    return findings


def _prompt(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt}
    items = list(prompt)
    if items and isinstance(items[0], Mapping):
        turns = [
            pb.Message(role=item["role"], content=item["content"])
            for item in cast(list[Mapping[str, str]], items)
        ]
        return {"messages": pb.Messages(messages=turns)}
    return {"token_ids": pb.TokenIds(ids=cast(list[int], items))}


def event_of(message: pb.GenerateResponse) -> Event | None:
    """Return an event, or None for one that this client is too old to know."""
    match message.WhichOneof("event"):
        case "started":
            started = message.started
            return Started(
                request_id=started.request_id,
                model=started.model,
                adapter_digest=started.adapter_digest,
                generation=started.generation,
                prompt_tokens=started.prompt_tokens,
            )
        case "delta":
            delta = message.delta
            return Delta(delta.text, tuple(delta.token_ids), tuple(map(_logprobs, delta.logprobs)))
        case "finished":
            finished = message.finished
            return Finished(
                reason=_member(FinishReason, finished.reason),
                usage=Usage(
                    prompt_tokens=finished.usage.prompt_tokens,
                    cached_tokens=finished.usage.cached_tokens,
                    completion_tokens=finished.usage.completion_tokens,
                ),
                stop_text=finished.stop_text,
            )
    return None


def _logprobs(message: pb.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(message.logprob, tuple((top.token_id, top.logprob) for top in message.top))


def completion_of(events: Sequence[Event]) -> Completion:
    """Return the whole answer of a stream."""
    deltas = [event for event in events if isinstance(event, Delta)]
    started = next((event for event in events if isinstance(event, Started)), None)
    finished = next((event for event in events if isinstance(event, Finished)), None)
    if started is None or finished is None:
        raise InternalFault("the server ended the stream without Started and Finished. Please report it.")
    return Completion(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        reason=finished.reason,
        usage=finished.usage,
        started=started,
        logprobs=tuple(item for delta in deltas for item in delta.logprobs),
        stop_text=finished.stop_text,
    )


def model_of(message: pb.Model) -> ModelInfo:
    """Return a model."""
    return ModelInfo(
        name=message.name,
        parent=message.parent,
        digest=message.digest,
        ranks=tuple(message.ranks),
        modules=tuple(message.modules),
        warnings=tuple(message.warnings),
        load_time=_time(message.load_time),
        generation=message.generation,
        max_seq_len=message.max_seq_len,
    )


def deployment_of(message: builder_pb2.Deployment) -> DeploymentInfo:
    """Return a deployment."""
    return DeploymentInfo(
        name=message.name,
        state=_member(DeploymentState, message.state),
        generation=message.generation or None,
        create_time=_time(message.create_time),
        update_time=_time(message.update_time),
        adapters=tuple(map(_adapter, message.adapters)),
        failure=_fault(message.failure) if message.HasField("failure") else None,
        unchanged=message.unchanged,
    )


def _adapter(message: builder_pb2.AdapterBuild) -> AdapterInfo:
    return AdapterInfo(
        name=message.name,
        stage=_member(Stage, message.stage),
        bytes_done=message.bytes_done,
        bytes_total=message.bytes_total or None,
        digest=message.digest,
        ranks=tuple(message.ranks),
        modules=tuple(message.modules),
        tensors_used=message.tensors_used,
        bundle_bytes=message.bundle_bytes,
        warnings=_findings(message.warnings),
        reused=message.reused,
    )


def report_of(message: builder_pb2.AdapterReport) -> AdapterReport:
    """Return the report of a check."""
    return AdapterReport(
        accepted=message.accepted,
        adapter=repository_from_message(message.adapter),
        base=repository_from_message(message.base),
        files={file.name: FileDigest(size=file.size, sha256=file.sha256) for file in message.files},
        findings=_findings(message.findings),
        rows=tuple(map(_row, message.rows)),
        dtype=DTYPE_NAMES.get(message.dtype) or Dtype.BFLOAT16,
        bundle_bytes=message.bundle_bytes,
        base_model_name=message.base_model_name,
    )


def _row(message: builder_pb2.AdapterRow) -> RowReport:
    fields = {name: getattr(message, name) for name in RowReport.__dataclass_fields__}
    return RowReport(**fields | {"truncated_from": message.truncated_from or None})


def _fault(message: builder_pb2.Failure) -> Fault:
    kind = FAULTS.get(message.reason, InternalFault)
    return kind(message.message, _findings(message.findings))


def _findings(messages: Iterable[builder_pb2.Finding]) -> tuple[Finding, ...]:
    return tuple(map(finding_from_message, messages))


def _time(message: Timestamp) -> datetime | None:
    return message.ToDatetime(UTC) if message.ByteSize() else None


def _member(kind: type[_E], number: int) -> _E:
    """Return the member with a proto number; the first, UNSPECIFIED, for one that is not known here."""
    members = list(kind)
    return members[number] if number < len(members) else members[0]
