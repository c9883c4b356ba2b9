"""Generation as the doors see it: a request with text in, a stream of events out."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import FinishReason, Sequence, StepOutput, Token
from inference_service.serving.brought import Brought
from inference_service.serving.catalog import Catalog, ServedModel
from inference_service.serving.engine_thread import EngineThread
from inference_service.serving.text import Detokenizer, StopTexts, Text
from shared.faults import Fault, Finding, InternalFault, PromptTooLong, RequestInvalid, Status

N = TypeVar("N", int, float)
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20

Prompt = str | list[int] | list[Mapping[str, str]]
"""Text, token ids or chat messages."""


class DeadlineExceeded(Fault):
    """The request's deadline passed; its sequence was freed."""

    reason = "DEADLINE_EXCEEDED"
    status = Status.DEADLINE_EXCEEDED


@dataclass(frozen=True)
class Request:
    """A request for one answer; None means that the client left it unset."""

    model: str
    prompt: Prompt
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    priority: int = 0
    deadline_s: float | None = None
    """On the clock of ``time.monotonic``."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Started:
    """The request was accepted."""

    request_id: str
    model: ServedModel
    generation: int
    prompt_tokens: int


@dataclass(frozen=True)
class Delta:
    """New text, and the tokens that were decoded for it."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Finished:
    """The answer is complete."""

    reason: FinishReason
    stop_text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


Event = Started | Delta | Finished


@dataclass(frozen=True)
class ServingLimits:
    """Bounds of a request."""

    max_seq_len: int
    """Tokens of prompt and answer together."""
    default_max_tokens: int | None
    """New tokens of a request that sets no limit; None: as many as fit."""
    eos_token_ids: frozenset[int]


class GenerationService:
    """Checks a request, runs it, and tells its story in events: Started, Delta ..., Finished, or one fault."""

    def __init__(self, catalog: Catalog, text: Text, engine: EngineThread, limits: ServingLimits) -> None:
        self.catalog = catalog
        self.limits = limits
        self._text = text
        self._engine = engine

    async def generate(self, request: Request) -> AsyncGenerator[Event]:
        """Answer a request.

        Raises:
            ModelNotFound: no such base or adapter.
            RequestInvalid: a field is out of bounds.
            PromptTooLong: prompt and answer do not fit.
            QueueFull: too many requests wait.
            DeadlineExceeded: the deadline passed.
        """
        model = self.catalog.get(request.model)
        _check(request, self._text.vocab)
        tokens = self._tokens(request.prompt, model.brought)
        sampling = self._sampling(request, len(tokens), model.brought)
        seq = Sequence(
            request.id,
            tokens,
            sampling,
            model.adapter,
            priority=request.priority,
            deadline_s=request.deadline_s,
        )
        detokenizer = self._text.detokenizer(tokens)
        stops = StopTexts(request.stop)
        prompt_tokens, completion_tokens = len(tokens), 0
        finish: FinishReason | None = None
        outputs = self._engine.submit(seq)
        try:
            yield Started(request.id, model, self.catalog.generation, prompt_tokens)
            while finish is None:
                arrived = await outputs.get()
                delta, finish = _advance(arrived, detokenizer, stops, sampling)
                completion_tokens += len(delta.tokens)
                yield delta
            stop_text = stops.found or ""
            yield Finished(finish, stop_text, prompt_tokens, arrived[-1].num_cached, completion_tokens)
        finally:
            outputs.close()

    def _tokens(self, prompt: Prompt, brought: Brought) -> list[int]:
        if isinstance(prompt, str):
            tokens = self._text.encode(prompt)
        elif prompt and isinstance(prompt[0], Mapping):
            messages = [item for item in prompt if isinstance(item, Mapping)]
            tokens = self._text.encode_messages(messages, brought.template)
        else:
            tokens = [item for item in prompt if isinstance(item, int)]
        if not tokens:
            raise RequestInvalid("the prompt is empty; expected at least one token.")
        return tokens

    def _sampling(self, request: Request, prompt_tokens: int, brought: Brought) -> SamplingParams:
        room = self.limits.max_seq_len - prompt_tokens
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {prompt_tokens} tokens, and at most {self.limits.max_seq_len - 1} leave room "
                "for an answer. Shorten the prompt."
            )
        if request.max_tokens is not None and request.max_tokens > room:
            raise PromptTooLong(
                f"{prompt_tokens} tokens of prompt and {request.max_tokens} of answer exceed the longest "
                f"sequence of {self.limits.max_seq_len}. Shorten the prompt, or ask for at most {room} tokens."
            )
        eos = self.limits.eos_token_ids | brought.stop_token_ids
        temperature = _first(request.temperature, brought.temperature, 0.0)
        return SamplingParams(
            max_tokens=request.max_tokens or min(self.limits.default_max_tokens or room, room),
            temperature=temperature,
            top_p=_first(request.top_p, brought.top_p, 1.0),
            top_k=_first(request.top_k, brought.top_k, 0),
            seed=secrets.randbits(63) if request.seed is None else request.seed,
            stop_token_ids=(frozenset() if request.ignore_eos else eos) | frozenset(request.stop_token_ids),
            logprobs=request.logprobs,
        )


def _first(said: N | None, brought: N | None, default: N) -> N:
    """Return what the request says, else what the adapter brings."""
    given = brought if said is None else said
    return default if given is None else given


def _advance(
    outputs: list[StepOutput], detokenizer: Detokenizer, stops: StopTexts, sampling: SamplingParams
) -> tuple[Delta, FinishReason | None]:
    """Turn outputs of the engine into text, up to a stop text; a stop token has no text."""
    text = ""
    tokens: list[Token] = []
    for output in outputs:
        if output.finish is FinishReason.DEADLINE:
            raise DeadlineExceeded("the deadline passed before the answer was complete; it was ended.")
        if output.token is None or output.finish is FinishReason.FAILED:
            raise InternalFault("the engine failed; the server's log has the details. Please report it.")
        tokens.append(output.token)
        silent = output.token.id in sampling.stop_token_ids
        text += stops.push("" if silent else detokenizer.push(output.token.id))
        if stops.found is not None:
            return Delta(text, tuple(tokens)), FinishReason.STOP
    finish = outputs[-1].finish
    return Delta(text + (stops.flush() if finish else ""), tuple(tokens)), finish


def _check(request: Request, vocab: int) -> None:
    """Raise `RequestInvalid` with every field that is out of bounds."""
    ids = request.prompt if isinstance(request.prompt, list) else []
    wrong_ids = [item for item in ids if isinstance(item, int) and not 0 <= item < vocab]
    temperature, top_p = request.temperature, request.top_p
    rules: list[tuple[bool, str, str, object]] = [
        (bool(wrong_ids), "token_ids", f"ids from 0 to {vocab - 1}", wrong_ids[:5]),
        (request.max_tokens == 0, "max_tokens", "at least 1", request.max_tokens),
        (not (temperature is None or 0 <= temperature <= 100), "temperature", "0 to 100", temperature),
        (not (top_p is None or 0 < top_p <= 1), "top_p", "above 0, at most 1", top_p),
        (len(request.stop) > MAX_STOPS, "stop", f"at most {MAX_STOPS} texts", len(request.stop)),
        (
            any(not 0 < len(text) <= MAX_STOP_CHARS for text in request.stop),
            "stop",
            f"texts of 1 to {MAX_STOP_CHARS} characters",
            sorted({len(text) for text in request.stop}),
        ),
        (len(request.stop_token_ids) > 64, "stop_token_ids", "at most 64", len(request.stop_token_ids)),
        ((request.logprobs or 0) > MAX_LOGPROBS, "logprobs", f"at most {MAX_LOGPROBS}", request.logprobs),
    ]
    findings = [
        Finding(code="E_BAD_FIELD", where=where, expected=expected, found=str(found))
        for broken, where, expected, found in rules
        if broken
    ]
    if findings:
        fields = ", ".join(sorted({finding.where for finding in findings}))
        raise RequestInvalid(f"the request has fields out of bounds: {fields}.", findings)
