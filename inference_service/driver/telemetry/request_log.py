"""The log of requests, and the other watchers that are opened beside the metrics."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import structlog
from structlog.contextvars import get_contextvars

from inference_service.core.request import AnswerDelta
from inference_service.driver.telemetry.record import RequestRecord, Watcher
from loramux_shared.tracing import Tracing

log = structlog.get_logger()
MAX_NAME = 128
"""Characters of a model that does not exist."""


class RequestLog:
    """A log line for each request: client, model and outcome; prompt and answers only with texts."""

    def __init__(self, *, texts: bool = False) -> None:
        self._texts = texts
        self._answers: defaultdict[int, defaultdict[int, str]] = defaultdict(lambda: defaultdict(str))
        """Texts by the record's identity: requests may have the same id."""

    def began(self, record: RequestRecord) -> None:
        """Say nothing yet."""

    def emitted(self, record: RequestRecord, delta: AnswerDelta) -> None:
        """Keep the text, where texts are wanted."""
        if self._texts:
            self._answers[id(record)][delta.index] += delta.text

    def ended(self, record: RequestRecord) -> None:
        """Write the line, in the context of the call: with the id that the server gave it."""
        texts_so_far: Mapping[int, str] = self._answers.pop(id(record), {})
        texts = {
            "prompt": record.request.prompt.content,
            "answers": [texts_so_far[index] for index in sorted(texts_so_far)],
        }
        record.context.run(_write, record, texts if self._texts else {})


def _write(record: RequestRecord, texts: Mapping[str, Any]) -> None:
    request, model = record.request, record.model
    log.info(
        "request ended",
        request_id=get_contextvars().get("request_id", request.id),
        id=request.id,
        model=model.name if model else request.model.name[:MAX_NAME],
        digest=model.digest[:12] if model else "",
        outcome=record.outcome,
        finish=[answer.finish.value if answer.finish else None for answer in record.answers],
        prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens,
        completion_tokens=record.completion_tokens,
        queue_ms=_ms(record.queue_s),
        ttft_ms=_ms(record.ttft_s),
        duration_ms=_ms(record.duration_s),
        **texts,
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 1)


def open_watchers(tracing: Tracing | None = None, *, log_prompts: bool = False) -> list[Watcher]:
    """Return the log of requests, and with tracing their spans."""
    watchers: list[Watcher] = [RequestLog(texts=log_prompts)]
    return watchers if tracing is None else [*watchers, tracing.watcher()]
