"""Generation as the doors see it: a request with text in, a stream of events out."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from inference_service.core.activation import activation
from inference_service.core.constraint import Constraint, Grammar, packed
from inference_service.core.sampling import LogprobsMode, SamplingParams
from inference_service.core.sequence import Sequence
from inference_service.serving.adapter_defaults import NO_DEFAULTS, AdapterDefaults
from inference_service.serving.answer import Answer
from inference_service.serving.base_files import BaseFiles, NoBaseFiles
from inference_service.serving.bounds import check, check_constraint
from inference_service.serving.catalog import Catalog, Changes, ServedModel
from inference_service.serving.constraints import Constraints
from inference_service.serving.delivery import Outputs
from inference_service.serving.engine_thread import EngineThread
from inference_service.serving.lengths import countable
from inference_service.serving.limits import Limiter, Ticket
from inference_service.serving.naming import Naming
from inference_service.serving.numbers import completing, drawable, first, of_answer, room
from inference_service.serving.parsers import parsers_of
from inference_service.serving.request import (
    Delta,
    Event,
    Finished,
    Message,
    Pair,
    Prompt,
    PromptLogprobs,
    Request,
    Served,
    Started,
    told,
)
from inference_service.serving.scoring import ScorerOf, no_scorer, require_text
from inference_service.serving.telemetry.metrics import Metrics
from inference_service.serving.telemetry.record import Watcher, following
from inference_service.serving.telemetry.replica import EngineView
from inference_service.serving.text import StopTexts, Text
from loramux_shared.access.rights import ACCESS
from loramux_shared.bundle.generation import Generation
from loramux_shared.faults import Finding, RequestInvalid
from loramux_shared.parsers import Parsers
from loramux_shared.pooling import Pooling

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

_numbers = itertools.count()


@dataclass(frozen=True)
class ServingLimits:
    """Bounds of a request."""

    max_seq_len: int
    """Tokens of prompt and answer together."""
    default_max_tokens: int | None
    """New tokens of a request that sets no limit; None: as many as fit."""
    eos_token_ids: frozenset[int]
    hidden_size: int = 0
    """Numbers of a vector."""


class GenerationService:
    """Checks a request, runs it, and tells its story in events, or in one fault.

    The story is Started, PromptLogprobs where they are asked for, then Delta ..., Finished for each of the n
    answers, which come in any mixture and carry their index. Where a vector is asked for it is Started, Pooled,
    Finished.
    """

    in_work: int = 0
    """Requests of all doors that have not ended."""
    parsers: Parsers = Parsers()
    """How answers of chats are read."""
    _watchers: Seq[Watcher] = ()

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
        self.naming = Naming(catalog)
        self.limiter = Limiter()
        self.logprobs_mode: LogprobsMode = "raw"
        """Of requests that say none."""
        self.pooling_of_base: Pooling | None = Pooling.LAST
        """How the base was trained to make vectors; None: in a way that is not served."""
        self.pooling: Pooling | None = None
        """What the deployment says about it."""
        self.base_files: BaseFiles = NoBaseFiles()
        self.scorer_of: ScorerOf = no_scorer
        self._watchers = (self.metrics, *watchers)
        self._engine = engine
        self.engine_view: EngineView = engine
        self._constraints = Constraints(limits.eos_token_ids)

    async def generate(self, request: Request) -> AsyncGenerator[Event]:
        """Answer a request.

        Raises:
            ModelNotFound: no such base or adapter.
            ReplicaBehind: there is no such generation here.
            RequestInvalid: a field is out of bounds, or its constraint or messages are refused.
            PromptTooLong: prompt and answer do not fit.
            RateLimited: the model, or the caller's key, has what its limits allow.
            QueueFull: too many requests wait.
            ReplicaFailed: the engine can go on no more.
            ReplicaPaused: an operator ended what was under way.
            DeadlineExceeded: the deadline passed.
        """
        with following(request, self._watchers) as follower, self._working():
            served = await self.naming.choose(request)
            model = follower.record.model = served.model
            if request.pooling is None:
                require_text(model)
            check(request, model.vocab or self.text.vocab, self._engine.max_queue, self.limits.max_seq_len)
            with self.limiter.admit(model, ACCESS.get()) as ticket:
                defaults = await self.naming.defaults(model)
                tokens = await self._tokens(request, defaults, self.limits.max_seq_len)
                if request.constraint_for is not None:
                    made = request.constraint_for(self._text(defaults).end_of(tokens))
                    request = replace(request, constraint=made)
                answers = await self._answers(request, model, tokens, defaults, ticket)
                seqs = [answer.seq for answer in answers.values()]
                follower.submitted(seqs)
                ticket.check_tokens()
                outputs = self._engine.submit(seqs)
                ticket.submitted(seqs[0])
                try:
                    yield Started(
                        request.id, model, served.generation, len(tokens), self._text(defaults), tuple(tokens)
                    )
                    async for event in _events(outputs, answers):
                        follower.see(event)
                        ticket.see(event)
                        yield event
                finally:
                    outputs.close()

    async def tokenize(self, request: Request) -> list[int]:
        """Return the tokens of a request's prompt, also of one that leaves no room for an answer.

        Raises:
            ModelNotFound: no such base or adapter.
            ReplicaBehind: there is no such generation here.
            RequestInvalid: a field is out of bounds, or its messages are refused.
            PromptTooLong: it has more tokens than are counted.
        """
        served = await self.naming.choose(request)
        vocab = served.model.vocab or self.text.vocab
        check(request, vocab, self._engine.max_queue, self.limits.max_seq_len)
        defaults = await self.naming.defaults(served.model)
        return await self._tokens(request, defaults, countable(self.limits.max_seq_len))

    def apply(self, generation: Generation) -> Changes:
        """Take over a generation on the same base: its names, versions, aliases and limits, in one step.

        Requests that have their model keep it, and what they count against.
        """
        changes = self.catalog.apply(generation)
        self.limiter.limits = generation.limits
        self.pooling = generation.pooling
        self.limits = replace(self.limits, default_max_tokens=generation.request_default_max_tokens)
        return changes

    @property
    def max_queue(self) -> int:
        """Sequences that may wait."""
        return self._engine.max_queue

    @property
    def usual_pooling(self) -> Pooling | None:
        """Of requests that say none; None: they must."""
        return self.pooling or self.pooling_of_base

    @contextmanager
    def _working(self) -> Iterator[None]:
        self.in_work += 1
        try:
            yield
        finally:
            self.in_work -= 1

    async def look_up(self, request: Request) -> tuple[Served, AdapterDefaults]:
        """Return what answers a request, and what that brings, for a door that has to know before it asks.

        A request that ends here is followed like one that ends in `generate`.

        Raises:
            Fault: as `generate` does.
        """
        try:
            served = await self.naming.choose(request)
            return served, await self.naming.defaults(served.model)
        except BaseException:
            with following(request, self._watchers):
                raise

    def parsers_of(self, model: ServedModel) -> Parsers | None:
        """Return how answers of a model are read; None of an adapter whose files nobody has read yet."""
        if model.defaults is None and model.name != self.catalog.base_name:
            return None
        defaults = model.defaults or NO_DEFAULTS
        return parsers_of(defaults.template or self._text(defaults).template, self.parsers)

    def _text(self, defaults: AdapterDefaults) -> Text:
        """Return what the tokens of a model mean."""
        return defaults.text or self.text

    async def _answers(
        self,
        request: Request,
        model: ServedModel,
        tokens: list[int],
        defaults: AdapterDefaults,
        ticket: Ticket,
    ) -> dict[str, Answer]:
        """Return the n answers of a request by the ids of their sequences."""
        sampling, text = self._sampling(request, len(tokens), defaults), self._text(defaults)
        if request.bad_words or request.bad_words_token_ids:
            words = await asyncio.to_thread(text.bad_words, request.bad_words)
            sampling = replace(sampling, bad_words=completing((*words, *request.bad_words_token_ids)))
        grammars = await self._grammars(request, defaults)
        number, where = next(_numbers), request.constraint.where if request.constraint else ""
        stop_tokens = frozenset(request.stop_token_ids) - self._ends(request, defaults)
        adapter, invocation = activation(model.mixture or model.adapter, tokens)
        answers: dict[str, Answer] = {}
        for index, grammar in enumerate(grammars):
            seq = Sequence(
                f"{number}.{index}",
                list(tokens),
                of_answer(sampling, index),
                adapter,
                priority=request.priority,
                deadline_s=request.deadline_s,
                grammar=grammar,
                invocation=invocation,
                pooling=request.pooling,
                cache_salt=request.cache_salt or "",
                model=model.name,
                counted=model.names if model.parts else (),
                flow=ticket.flow,
                share=ticket.share,
            )
            stops = StopTexts(request.stop, keep=request.include_stop_str_in_output)
            detokenizer = text.detokenizer(
                tokens,
                skip_special_tokens=request.skip_special_tokens,
                shown=request.shown_special_tokens,
            )
            answers[seq.id] = Answer(index, seq, detokenizer, stops, stop_tokens, where)
        return answers

    async def _tokens(self, request: Request, defaults: AdapterDefaults, most: int) -> list[int]:
        """Return the tokens of a prompt, of which a text may have so many unless it is cut."""
        prompt, cut = request.prompt, request.truncate_prompt_tokens
        text = self._text(defaults)
        if cut is not None:
            most = countable(most)
        if isinstance(prompt, Pair):
            special = request.add_special_tokens is not False
            tokens = await asyncio.to_thread(text.encode_pair, prompt, most, add_special_tokens=special)
        elif isinstance(prompt, str):
            special = request.add_special_tokens is not False
            tokens = await asyncio.to_thread(text.encode_prompt, prompt, most, add_special_tokens=special)
        elif prompt and isinstance(prompt[0], Mapping):
            tokens = await text.encode_messages(
                [item for item in prompt if isinstance(item, Mapping)],
                most,
                defaults.template,
                request.tools,
                request.chat_template_kwargs,
                add_generation_prompt=request.add_generation_prompt,
                add_special_tokens=bool(request.add_special_tokens),
                continue_final_message=request.continue_final_message,
            )
        else:
            tokens = [item for item in prompt if isinstance(item, int)]
        if not tokens:
            finding = Finding(code="E_BAD_FIELD", where="prompt", expected="at least one token", found="none")
            raise RequestInvalid("the prompt is empty.", [finding])
        if cut == -1:
            longest = self.limits.max_seq_len
            usual = min(self.limits.default_max_tokens or 1, longest - 1)
            cut = longest - (usual if request.max_tokens is None else request.max_tokens)
        return tokens if cut is None or cut < 1 else tokens[-cut:]

    async def _grammars(self, request: Request, defaults: AdapterDefaults) -> list[Grammar | None]:
        """Return a grammar for each answer, or None for each."""
        constraint = request.constraint
        try:
            check_constraint(constraint)
            if constraint is None:
                return [None] * request.n
            compiled = await self._constraints.compile(constraint, self._text(defaults))
        except RequestInvalid:
            if constraint is None or not constraint.optional:
                raise
            return [None] * request.n
        ends = self._ends_of_text(request, defaults)
        return [compiled.begin(ends, optional=constraint.optional) for _ in range(request.n)]

    def _allowed(self, request: Request, defaults: AdapterDefaults) -> bytes | None:
        """Return the mask of the tokens that a request allows; the end of a text is left to its constraint."""
        if request.allowed_token_ids is None:
            return None
        ends = self._ends_of_text(request, defaults) if request.constraint else frozenset()
        allowed = np.zeros(self._text(defaults).vocab, np.bool_)
        allowed[[*request.allowed_token_ids, *ends]] = True
        return packed(allowed)

    def _ends_of_text(self, request: Request, defaults: AdapterDefaults) -> frozenset[int]:
        special = self._text(defaults).vocabulary.special
        return self._ends(request, defaults) | (special & set(request.stop_token_ids))

    def _ends(self, request: Request, defaults: AdapterDefaults) -> frozenset[int]:
        return frozenset() if request.ignore_eos else self.limits.eos_token_ids | defaults.stop_token_ids

    def _sampling(self, request: Request, prompt_tokens: int, defaults: AdapterDefaults) -> SamplingParams:
        fits = room(request.max_tokens, prompt_tokens, self.limits.max_seq_len)
        most = min(self.limits.default_max_tokens or fits, fits)
        own: dict[str, Any] = {
            "max_tokens": most if request.max_tokens is None else request.max_tokens,
            "temperature": drawable(
                first(request.temperature, defaults.temperature, request.usual_temperature)
            ),
            "top_p": drawable(first(request.top_p, defaults.top_p, 1.0)),
            "top_k": min(max(0, first(request.top_k, defaults.top_k, 0)), self._text(defaults).vocab),
            "seed": secrets.randbits(63) if request.seed is None else request.seed,
            "stop_token_ids": self._ends(request, defaults) | frozenset(request.stop_token_ids),
            "allowed_token_ids": self._allowed(request, defaults),
            "logprobs_mode": request.logprobs_mode or self.logprobs_mode,
            "bad_words": {},  # they become tokens on another thread
        }
        return SamplingParams(**told(request, SamplingParams) | own)


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
