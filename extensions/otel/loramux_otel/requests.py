"""Spans of a request between its arrival and its last token.

They are made when the request has ended, from times that were noted anyway: a token costs nothing more.
Names and attributes are those of OpenTelemetry's conventions for generative AI, where it has one.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.util.types import AttributeValue

from inference_service.core.request import AnswerDelta, Request
from inference_service.driver.telemetry.record import OK, RequestRecord

PROVIDER: Final = "loramux"


class RequestSpans:
    """A factory of a span per request below the server's, and below it queue, prefill, and a decode per
    answer.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def began(self, record: RequestRecord) -> None:
        """Wait for the end."""

    def emitted(self, record: RequestRecord, delta: AnswerDelta) -> None:
        """Wait for the end."""

    def ended(self, record: RequestRecord) -> None:
        """Make the spans; the parent is the span that was current when the request came."""
        record.context.run(self._make, record)

    def _make(self, record: RequestRecord) -> None:
        operation = _operation(record.request)
        name = f"{operation} {record.model.name}" if record.model else operation
        start_ns = time.time_ns() - _ns(time.monotonic() - record.arrived_s)
        span = self._tracer.start_span(name, kind=SpanKind.INTERNAL, start_time=start_ns)
        span.set_attributes(_attributes(record, operation))
        if record.outcome != OK:
            span.set_attribute("error.type", record.outcome)
            span.set_status(Status(StatusCode.ERROR, record.outcome))
        self._make_phases(record, span, start_ns)
        span.end(_at(start_ns, record, record.ended_s))

    def _make_phases(self, record: RequestRecord, parent: Span, start_ns: int) -> None:
        context = set_span_in_context(parent)
        for phase in _phases(record):
            attributes, start = phase.attributes, _at(start_ns, record, phase.start_s)
            child = self._tracer.start_span(phase.name, context, attributes=attributes, start_time=start)
            child.end(_at(start_ns, record, record.ended_s if phase.end_s is None else phase.end_s))


@dataclass(frozen=True)
class RequestPhase:
    """A part of a request's way; it continued to the end when its own is not known."""

    name: str
    start_s: float
    end_s: float | None
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)


def _phases(record: RequestRecord) -> Iterator[RequestPhase]:
    if record.submitted_s is not None:
        yield RequestPhase("queue", record.submitted_s, record.began_s)
    if record.began_s is not None:
        yield RequestPhase("prefill", record.began_s, record.first_s)
    for index, answer in enumerate(record.answers):
        if answer.first_s is not None:
            attributes = {"loramux.answer.index": index, "gen_ai.usage.output_tokens": answer.tokens}
            yield RequestPhase("decode", answer.first_s, answer.last_s, attributes)


def _operation(request: Request) -> str:
    if request.output.pooling is not None:
        return "embeddings"
    prompt = request.prompt.content
    messages = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], Mapping)
    return "chat" if messages else "text_completion"


def _attributes(record: RequestRecord, operation: str) -> Mapping[str, AttributeValue]:
    request, model = record.request, record.model
    known: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": request.model.name[:128],
        "gen_ai.request.choice.count": request.output.n,
        "gen_ai.request.max_tokens": request.sampling.max_tokens,
        "gen_ai.request.temperature": record.temperature,
        "gen_ai.request.top_p": request.sampling.top_p,
        "gen_ai.request.seed": request.sampling.seed,
        "gen_ai.response.id": request.id,
        "gen_ai.response.finish_reasons": [a.finish.value for a in record.answers if a.finish],
        "gen_ai.response.time_to_first_chunk": record.ttft_s,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "loramux.adapter.digest": model.digest[:12] if model and model.digest else None,
    }
    return {name: value for name, value in known.items() if value is not None}


def _at(start_ns: int, record: RequestRecord, moment_s: float | None) -> int:
    return start_ns + _ns((moment_s or record.arrived_s) - record.arrived_s)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
