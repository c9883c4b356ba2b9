"""Messages of the services as records, and the other way round; both clients stand on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from loramux.builder.v1 import builder_pb2
from loramux.inference.v1 import inference_pb2 as pb
from loramux.messages import DTYPE_NAMES, finding_from_message, repository_from_message
from loramux.records import (
    AdapterInfo,
    AdapterReport,
    Choice,
    Completion,
    Delta,
    DeploymentInfo,
    DeploymentState,
    Event,
    Finished,
    FinishReason,
    ModelInfo,
    PromptLogprobs,
    PromptToken,
    RowReport,
    Stage,
    Started,
    TokenLogprobs,
    Usage,
)
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.deployment import Dtype
from loramux_shared.faults import FAULTS, Fault, Finding, InternalFault

_E = TypeVar("_E", bound=StrEnum)


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
        case "prompt_logprobs":
            return PromptLogprobs(tuple(map(_prompt_token, message.prompt_logprobs.tokens)))
        case "delta":
            delta = message.delta
            logprobs = tuple(_logprobs(item.logprob, item) for item in delta.logprobs)
            return Delta(delta.text, tuple(delta.token_ids), logprobs, delta.index)
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
                stop_token_id=finished.stop_token_id if finished.HasField("stop_token_id") else None,
                index=finished.index,
            )
    return None


def _prompt_token(message: pb.PromptToken) -> PromptToken:
    logprobs = _logprobs(message.logprob, message) if message.HasField("logprob") else None
    return PromptToken(message.token_id, logprobs)


def _logprobs(logprob: float, message: pb.TokenLogprobs | pb.PromptToken) -> TokenLogprobs:
    return TokenLogprobs(
        logprob,
        tuple((top.token_id, top.logprob) for top in message.top),
        message.token,
        tuple(top.token for top in message.top),
        message.rank,
    )


def completion_of(events: Sequence[Event]) -> Completion:
    """Return the whole answers of a stream."""
    started = next((event for event in events if isinstance(event, Started)), None)
    finished = {event.index: event for event in events if isinstance(event, Finished)}
    if started is None or not finished:
        raise InternalFault("the server ended the stream without Started and Finished. Please report it.")
    deltas: dict[int, list[Delta]] = {index: [] for index in sorted(finished)}
    for event in events:
        if isinstance(event, Delta):
            deltas[event.index].append(event)
    choices = tuple(_choice(deltas[index], finished[index]) for index in deltas)
    prompt = tuple(token for event in events if isinstance(event, PromptLogprobs) for token in event.tokens)
    return Completion(**vars(choices[0]), started=started, choices=choices, prompt=prompt)


def _choice(deltas: Sequence[Delta], finished: Finished) -> Choice:
    return Choice(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        reason=finished.reason,
        usage=finished.usage,
        logprobs=tuple(item for delta in deltas for item in delta.logprobs),
        stop_text=finished.stop_text,
        stop_token_id=finished.stop_token_id,
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
        load_time=time_of(message.load_time),
        generation=message.generation,
        max_seq_len=message.max_seq_len,
        kinds=tuple(message.kinds),
        replaced_rows=dict(message.replaced_rows),
        invocation_tokens=tuple(message.invocation_tokens),
        licence=message.licence,
        base_licence=message.base_licence,
        tool_parser=message.tool_parser,
        reasoning_parser=message.reasoning_parser,
        num_labels=message.num_labels,
    )


def deployment_of(message: builder_pb2.Deployment) -> DeploymentInfo:
    """Return a deployment."""
    return DeploymentInfo(
        name=message.name,
        state=_member(DeploymentState, message.state),
        generation=message.generation or None,
        create_time=time_of(message.create_time),
        update_time=time_of(message.update_time),
        adapters=tuple(map(adapter_of, message.adapters)),
        failure=_fault(message.failure) if message.HasField("failure") else None,
        unchanged=message.unchanged,
    )


class Watched:
    """A watched deployment, put together from messages of which each holds the adapters that changed."""

    def __init__(self) -> None:
        self._adapters: dict[str, AdapterInfo] = {}
        self._building = False

    def state_of(self, message: builder_pb2.WatchDeploymentResponse) -> DeploymentInfo:
        """Return the whole state after a message; an adapter that did not change is the same object."""
        info = deployment_of(message.deployment)
        if not self._building:
            self._adapters = {}  # of the build before
        self._building = info.state is DeploymentState.BUILDING
        self._adapters |= {adapter.name: adapter for adapter in info.adapters}
        return replace(info, adapters=tuple(self._adapters.values()))


def adapter_of(message: builder_pb2.AdapterBuild) -> AdapterInfo:
    """Return the build of an adapter."""
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
        repaired=message.repaired,
        kept=message.kept,
        added=message.added,
        kinds=tuple(message.kinds),
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
        licence=message.licence,
        base_licence=message.base_licence,
        kinds=tuple(message.kinds),
        replaced_rows=dict(message.replaced_rows),
        invocation_tokens=tuple(message.invocation_tokens),
        labels=tuple(message.labels),
        problem_type=message.problem_type,
    )


def _row(message: builder_pb2.AdapterRow) -> RowReport:
    fields = {name: getattr(message, name) for name in RowReport.__dataclass_fields__}
    expert = message.expert if message.HasField("expert") else None
    return RowReport(**fields | {"truncated_from": message.truncated_from or None, "expert": expert})


def _fault(message: builder_pb2.Failure) -> Fault:
    kind = FAULTS.get(message.reason, InternalFault)
    return kind(message.message, _findings(message.findings))


def _findings(messages: Iterable[builder_pb2.Finding]) -> tuple[Finding, ...]:
    return tuple(map(finding_from_message, messages))


def time_of(message: Timestamp) -> datetime | None:
    """Return a moment; None where there is none."""
    return message.ToDatetime(UTC) if message.ByteSize() else None


def _member(kind: type[_E], number: int) -> _E:
    """Return the member with a proto number; the first, UNSPECIFIED, for one that is not known here."""
    members = list(kind)
    return members[number] if number < len(members) else members[0]
