"""Generation as the doors see it: a request with text in, a stream of events out."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Final, TypeVar

import numpy as np

from inference_service.core.constraint import Constraint, Grammar, packed
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence
from inference_service.serving.adapter_defaults import AdapterDefaults
from inference_service.serving.answer import Answer
from inference_service.serving.bounds import check
from inference_service.serving.catalog import Catalog, ServedModel
from inference_service.serving.constraints import Constraints
from inference_service.serving.engine_thread import EngineThread, Outputs
from inference_service.serving.lengths import countable, prompt_too_long
from inference_service.serving.request import (
    Delta,
    Event,
    Finished,
    Message,
    Prompt,
    PromptLogprobs,
    Request,
    Started,
    told,
)
from inference_service.serving.telemetry.metrics import Metrics
from inference_service.serving.telemetry.record import Watcher, following
from inference_service.serving.telemetry.replica import EngineView
from inference_service.serving.text import StopTexts, Text
from loramux_shared.faults import PromptTooLong, RequestInvalid

__all__ = [
    "Constraint",
    "Delta",
    "Event",
    "Finished",
    "GenerationService",
    "Message",
    "Prompt",
    "PromptLogprobs",
    "Request",
    "ServingLimits",
    "Started",
]

N = TypeVar("N", int, float)
LEAST: Final = 1e-6
"""Temperatures and top_p between 0 and this mean this: less would divide by what float32 takes for 0."""
_numbers = itertools.count()


@dataclass(frozen=True)
class ServingLimits:
    """Bounds of a request."""

    max_seq_len: int
    """Tokens of prompt and answer together."""
    default_max_tokens: int | None
    """New tokens of a request that sets no limit; None: as many as fit."""
    eos_token_ids: frozenset[int]


class GenerationService:
    """Checks a request, runs it, and tells its story in events, or in one fault.

    The story is Started, PromptLogprobs where they are asked for, then Delta ..., Finished for each of the n
    answers, which come in any mixture and carry their index.
    """

    in_work: int = 0
    """Requests of all doors that have not ended."""

    def __init__(
        self,
        catalog: Catalog,
        text: Text,
        engine: EngineThread,
        limits: ServingLimits,
        watchers: Seq[Watcher] = (),
    ) -> None:
        """Begin to serve; watchers hear of every request, as the metrics do."""
        self.catalog = catalog
        self.limits = limits
        self.text = text
        self.metrics = Metrics(catalog, engine)
        self._watchers = (self.metrics, *watchers)
        self._engine = engine
        self.engine_view: EngineView = engine
        self._constraints = Constraints(text, limits.eos_token_ids)

    async def generate(self, request: Request) -> AsyncGenerator[Event]:
        """Answer a request.

        Raises:
            ModelNotFound: no such base or adapter.
            RequestInvalid: a field is out of bounds, or its constraint or messages are refused.
            PromptTooLong: prompt and answer do not fit.
            QueueFull: too many requests wait.
            ReplicaFailed: the engine can go on no more.
            ReplicaPaused: an operator ended what was under way.
            DeadlineExceeded: the deadline passed.
        """
        with following(request, self._watchers) as follower, self._working():
            model = follower.record.model = self.catalog.get(request.model)
            check(request, self.text.vocab, self._engine.max_queue, self.limits.max_seq_len)
            tokens = await self._tokens(request, model.defaults)
            sampling = self._sampling(request, len(tokens), model.defaults)
            if request.bad_words:
                words = await asyncio.to_thread(self.text.bad_words, request.bad_words)
                sampling = replace(sampling, bad_words=words)
            grammars = await self._grammars(request, model.defaults)
            answers = self._answers(request, model, tokens, sampling, grammars)
            seqs = [answer.seq for answer in answers.values()]
            follower.submitted(seqs)
            outputs = self._engine.submit(seqs)
            try:
                yield Started(request.id, model, self.catalog.generation, len(tokens), tuple(tokens))
                async for event in _events(outputs, answers):
                    follower.see(event)
                    yield event
            finally:
                outputs.close()

    @contextmanager
    def _working(self) -> Iterator[None]:
        self.in_work += 1
        try:
            yield
        finally:
            self.in_work -= 1

    def _answers(
        self,
        request: Request,
        model: ServedModel,
        tokens: list[int],
        sampling: SamplingParams,
        grammars: Seq[Grammar | None],
    ) -> dict[str, Answer]:
        """Return the n answers of a request by the ids of their sequences."""
        number, where = next(_numbers), request.constraint.where if request.constraint else ""
        stop_tokens = frozenset(request.stop_token_ids) - self._ends(request, model.defaults)
        answers: dict[str, Answer] = {}
        for index, grammar in enumerate(grammars):
            seq = Sequence(
                f"{number}.{index}",
                list(tokens),
                _of_answer(sampling, index),
                model.adapter,
                priority=request.priority,
                deadline_s=request.deadline_s,
                grammar=grammar,
                cache_salt=request.cache_salt or "",
                model=model.name,
                flow=model.name,
            )
            stops = StopTexts(request.stop, keep=request.include_stop_str_in_output)
            detokenizer = self.text.detokenizer(tokens, skip_special_tokens=request.skip_special_tokens)
            answers[seq.id] = Answer(index, seq, detokenizer, stops, stop_tokens, where)
        return answers

    async def _tokens(self, request: Request, defaults: AdapterDefaults) -> list[int]:
        prompt, most, cut = request.prompt, self.limits.max_seq_len, request.truncate_prompt_tokens
        if cut is not None:
            most = countable(most)
        if isinstance(prompt, str):
            special = request.add_special_tokens is not False
            tokens = await asyncio.to_thread(self.text.encode_prompt, prompt, most, add_special_tokens=special)
        elif prompt and isinstance(prompt[0], Mapping):
            tokens = await self.text.encode_messages(
                [item for item in prompt if isinstance(item, Mapping)],
                most,
                defaults.template,
                request.tools,
                add_generation_prompt=request.add_generation_prompt,
                add_special_tokens=bool(request.add_special_tokens),
                continue_final_message=request.continue_final_message,
            )
        else:
            tokens = [item for item in prompt if isinstance(item, int)]
        if not tokens:
            raise RequestInvalid("the prompt is empty; expected at least one token.")
        if cut == -1:
            longest = self.limits.max_seq_len
            usual = min(self.limits.default_max_tokens or 1, longest - 1)
            cut = longest - (usual if request.max_tokens is None else request.max_tokens)
        return tokens if cut is None or cut < 1 else tokens[-cut:]

    async def _grammars(self, request: Request, defaults: AdapterDefaults) -> list[Grammar | None]:
        """Return a grammar for each answer, or None for each."""
        if request.constraint is None:
            return [None] * request.n
        ends = self._ends_of_text(request, defaults)
        compiled = await self._constraints.compile(request.constraint)
        return [compiled.begin(ends) for _ in range(request.n)]

    def _allowed(self, request: Request, defaults: AdapterDefaults) -> bytes | None:
        """Return the mask of the tokens that a request allows; the end of a text is left to its constraint."""
        if request.allowed_token_ids is None:
            return None
        ends = self._ends_of_text(request, defaults) if request.constraint else frozenset()
        allowed = np.zeros(self.text.vocab, np.bool_)
        allowed[[*request.allowed_token_ids, *ends]] = True
        return packed(allowed)

    def _ends_of_text(self, request: Request, defaults: AdapterDefaults) -> frozenset[int]:
        return self._ends(request, defaults) | (self.text.vocabulary.special & set(request.stop_token_ids))

    def _ends(self, request: Request, defaults: AdapterDefaults) -> frozenset[int]:
        return frozenset() if request.ignore_eos else self.limits.eos_token_ids | defaults.stop_token_ids

    def _sampling(self, request: Request, prompt_tokens: int, defaults: AdapterDefaults) -> SamplingParams:
        room = self._room(request.max_tokens, prompt_tokens)
        most = min(self.limits.default_max_tokens or room, room)
        own: dict[str, Any] = {
            "max_tokens": most if request.max_tokens is None else request.max_tokens,
            "temperature": _above(LEAST, _first(request.temperature, defaults.temperature, 0.0)),
            "top_p": _above(LEAST, _first(request.top_p, defaults.top_p, 1.0)),
            "top_k": min(max(0, _first(request.top_k, defaults.top_k, 0)), self.text.vocab),
            "seed": secrets.randbits(63) if request.seed is None else request.seed,
            "stop_token_ids": self._ends(request, defaults) | frozenset(request.stop_token_ids),
            "allowed_token_ids": self._allowed(request, defaults),
            "bad_words": {},  # they become tokens on another thread
        }
        return SamplingParams(**told(request, SamplingParams) | own)

    def _room(self, wanted: int | None, prompt_tokens: int) -> int:
        """Return how many new tokens fit behind a prompt.

        Raises:
            PromptTooLong: not as many as are wanted.
        """
        room = self.limits.max_seq_len - prompt_tokens
        if room < (0 if wanted == 0 else 1):
            raise prompt_too_long(prompt_tokens, self.limits.max_seq_len)
        if wanted is not None and wanted > room:
            raise PromptTooLong(
                f"{prompt_tokens} tokens of prompt and {wanted} of answer exceed the longest "
                f"sequence of {self.limits.max_seq_len}. Shorten the prompt, or ask for at most {room} tokens."
            )
        return room


async def _events(outputs: Outputs, answers: Mapping[str, Answer]) -> AsyncGenerator[Event]:
    """Turn outputs into events until every answer is finished; each is let go as soon as it is."""
    while not all(answer.finished for answer in answers.values()):
        arrived = await outputs.get()
        for seq_id in dict.fromkeys(output.seq_id for output in arrived):
            answer = answers[seq_id]
            for event in answer.advance([output for output in arrived if output.seq_id == seq_id]):
                yield event
            if answer.finished:
                outputs.drop(seq_id)


def _of_answer(sampling: SamplingParams, index: int) -> SamplingParams:
    """Return the sampling of one answer: only the first scores the prompt, the others have own seeds."""
    if not index:
        return sampling
    seed = int.from_bytes(blake2b(f"{sampling.seed}:{index}".encode(), digest_size=8).digest()) >> 1
    return replace(sampling, seed=seed, prompt_logprobs=None)


def _first(said: N | None, adapters: N | None, default: N) -> N:
    """Return what the request says, else what the adapter brings."""
    given = adapters if said is None else said
    return default if given is None else given


def _above(least: float, value: float) -> float:
    """Return a value that is 0 or not below the least."""
    return max(least, value) if value else value
