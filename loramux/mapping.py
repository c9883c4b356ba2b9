"""Messages of the services as records, and the other way round; both clients stand on it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from datetime import UTC
from enum import StrEnum
from typing import Any, TypeVar, cast

from google.protobuf.message import Message
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
_R = TypeVar("_R")


def event_of(message: pb.GenerateResponse) -> Event | None:
    """Return an event, or None for one that this client is too old to know."""
    match message.WhichOneof("event"):
        case "started":
            return record_of(Started, message.started)
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
                usage=record_of(Usage, finished.usage),
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
    return record_of(ModelInfo, message)


def deployment_of(message: builder_pb2.Deployment) -> DeploymentInfo:
    """Return a deployment."""
    return record_of(
        DeploymentInfo,
        message,
        state=_member(DeploymentState, message.state),
        generation=message.generation or None,
        adapters=tuple(map(adapter_of, message.adapters)),
        failure=_fault(message.failure) if message.HasField("failure") else None,
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
    return record_of(
        AdapterInfo,
        message,
        stage=_member(Stage, message.stage),
        bytes_total=message.bytes_total or None,
        warnings=_findings(message.warnings),
    )


def report_of(message: builder_pb2.AdapterReport) -> AdapterReport:
    """Return the report of a check."""
    return record_of(
        AdapterReport,
        message,
        adapter=repository_from_message(message.adapter),
        base=repository_from_message(message.base),
        files={file.name: FileDigest(size=file.size, sha256=file.sha256) for file in message.files},
        findings=_findings(message.findings),
        rows=tuple(map(_row, message.rows)),
        dtype=DTYPE_NAMES.get(message.dtype) or Dtype.BFLOAT16,
    )


def _row(message: builder_pb2.AdapterRow) -> RowReport:
    expert = message.expert if message.HasField("expert") else None
    return record_of(RowReport, message, truncated_from=message.truncated_from or None, expert=expert)


def _fault(message: builder_pb2.Failure) -> Fault:
    kind = FAULTS.get(message.reason, InternalFault)
    return kind(message.message, _findings(message.findings))


def _findings(messages: Iterable[builder_pb2.Finding]) -> tuple[Finding, ...]:
    return tuple(map(finding_from_message, messages))


def record_of(kind: Callable[..., _R], message: Message, **others: Any) -> _R:
    """Return a record of the fields of a message that have the names of its own, beside those that are given.

    A list becomes a tuple, a map a dictionary, and a moment that is not set None.
    """
    names = [field.name for field in fields(cast(Any, kind)) if field.name not in others]
    return kind(**{name: plain(getattr(message, name)) for name in names}, **others)


def plain(value: Any) -> Any:
    """Return the value of a field without protobuf: a list as a tuple, a map as a dictionary."""
    if isinstance(value, str | bytes | int | float):
        return value
    if isinstance(value, Timestamp):
        return value.ToDatetime(UTC) if value.ByteSize() else None
    return dict(value) if isinstance(value, Mapping) else tuple(value)


def _member(kind: type[_E], number: int) -> _E:
    """Return the member with a proto number; the first, UNSPECIFIED, for one that is not known here."""
    members = list(kind)
    return members[number] if number < len(members) else members[0]
