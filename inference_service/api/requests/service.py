"""Generation for the APIs: a request with text in, a stream of events out."""

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from inference_service.adapters.texts import Scorer
from inference_service.api.requests.answer import Answer
from inference_service.api.requests.bounds import check, countable
from inference_service.api.requests.terms import ServingLimits, Terms
from inference_service.core.request import AnswerDelta, AnswerStarted, Event, Request, ResolvedModel
from inference_service.core.sampling import LogprobsMode
from inference_service.core.sequence import StepOutput
from inference_service.core.served_model import AdapterDefaults, ServedModel, require_text
from inference_service.driver.delivery import Outputs, Sink
from inference_service.driver.engine_driver import EngineDriver
from inference_service.driver.port import Driver, Submission
from inference_service.driver.telemetry.metrics import RequestMetrics
from inference_service.driver.telemetry.record import RequestFollower, Watcher, following
from inference_service.store import Batches
from inference_service.text.text import StopTexts, Text
from loramux_shared.access.keys import ACCESS
from loramux_shared.faults import InternalFault
from loramux_shared.runtime import OF_DECODERS, OF_ENCODERS, Parsers, Pooling, ReasoningParser

ParsersOf = Callable[[str, ReasoningParser], Parsers]


class GenerationService:
    """Checks a request, runs it, and reports it as events, or as one fault.

    The events are AnswerStarted, PromptScores where they are asked for, then AnswerDelta ..., AnswerFinished
    for each of the n answers, which are interleaved and carry their index. A request for a vector has
    AnswerStarted, Pooled and AnswerFinished.
    """

    def __init__(
        self,
        driver: Driver,
        text: Text,
        limits: ServingLimits,
        metrics: RequestMetrics,
        watchers: Seq[Watcher] = (),
        *,
        pooling_of_base: Pooling | None = Pooling.LAST,
        prompts_of_base: Mapping[str, str] = MappingProxyType({}),
        parsers_of: ParsersOf = Parsers,
        logprobs_mode: LogprobsMode = "raw",
        batches: Batches | None = None,
    ) -> None:
        """Begin to serve; watchers see every request, as the metrics do.

        pooling_of_base is how the base was trained to make vectors; None: in a way that is not served.
        prompts_of_base are texts that it was trained to read in front of others, by name.
        parsers_of returns how answers of chats are read, where a deployment names these parsers.
        logprobs_mode is that of requests that name none.
        """
        self.driver = driver
        self.limits = limits
        self.text = text
        self.metrics = metrics
        self.logprobs_mode: LogprobsMode = logprobs_mode
        self.pooling_of_base = pooling_of_base
        self.prompts_of_base = prompts_of_base
        self.batches = batches
        """None without a store for them."""
        self.parsers_of = parsers_of
        self.watchers = (metrics, *watchers)
        self._in_work = 0

    @property
    def in_work(self) -> int:
        """Return the requests of all APIs that have not ended."""
        return self._in_work

    @property
    def local(self) -> EngineDriver:
        """Return the driver of the engine in this process, for operators; raise InternalFault where the engine
        is in another.
        """
        if not isinstance(self.driver, EngineDriver):
            raise InternalFault("an API process was asked for what the engine's knows. Please report it.")
        return self.driver

    def add_in_work(self, number: int) -> None:
        """Count requests of API processes that began, or ended where the number is negative."""
        self._in_work += number

    async def generate(self, request: Request, sink: Sink[AnswerDelta] | None = None) -> AsyncGenerator[Event]:
        """Answer a request; deltas that a sink has room for go there, and are not yielded.

        Raises:
            ModelNotFound: no such base or adapter.
            ReplicaBehind: there is no such generation here.
            GenerationNotFound: nor anywhere: none of that number was published.
            RequestInvalid: a field is out of bounds, or its constraint or messages are refused.
            PromptTooLong: prompt and answer do not fit.
            RateLimited: the model, or the caller's key, has what its limits allow.
            QueueFull: too many requests wait.
            ReplicaFailed: the engine failed.
            ReplicaPaused: an operator ended what was under way.
            DeadlineExceeded: the deadline passed.
            NumericsFault: its values are NaN or infinite.
            ModelUnusable: those of the adapter were so several times.
        """
        with following(request, self.watchers) as follower, self._working():
            served = await self.choose(request)
            model = follower.record.model = served.model
            if request.output.pooling is None:
                require_text(model, of_base=self.limits.generates)
            check(request, model.vocab or self.text.vocab, self.max_queue, self.limits.max_seq_len)
            with self.driver.admit(model) as admission:
                defaults = await self.defaults(model)
                terms = self._terms(request, defaults)
                tokens, second = await terms.prompt(self.limits.max_seq_len)
                terms.check_rows(tokens, second)
                if (by_ending := request.output.constraint_by_ending) is not None:
                    constraint = by_ending.behind(terms.text.end_of(tokens))
                    output = replace(request.output, constraint=constraint)
                    terms = replace(terms, request=replace(request, output=output))
                submission = await terms.submission(model, tokens, second)
                follower.prepared(submission)
                outputs = await admission.submit(submission)
                try:
                    follower.submitted(outputs.views.values(), outputs.submitted_s)
                    answers = _answers(terms, submission, outputs)
                    yield AnswerStarted(
                        request.id, model, served.generation, len(tokens), terms.text, tuple(tokens)
                    )
                    if sink is not None and not request.sampling.stop:
                        outputs.divert(partial(_sink, answers, follower, sink))
                    while outputs.open:
                        for event in _events(await outputs.get(), answers, outputs):
                            follower.see(event)
                            yield event
                finally:
                    outputs.close()

    async def tokenize(self, request: Request) -> list[int]:
        """Return the tokens of a request's prompt, also of one that leaves no room for an answer.

        Raises:
            ModelNotFound: no such base or adapter.
            ReplicaBehind: there is no such generation here.
            GenerationNotFound: nor anywhere: none of that number was published.
            RequestInvalid: a field is out of bounds, or its messages are refused.
            PromptTooLong: it has more tokens than are counted.
        """
        served = await self.choose(request)
        vocab = served.model.vocab or self.text.vocab
        check(request, vocab, self.max_queue, self.limits.max_seq_len)
        defaults = await self.defaults(served.model)
        return (await self._terms(request, defaults).prompt(countable(self.limits.max_seq_len))).ids

    async def choose(self, request: Request) -> ResolvedModel:
        """Return what answers a request; raise what `Naming.choose` does."""
        return request.model.served or await self.driver.choose(request)

    async def defaults(self, model: ServedModel) -> AdapterDefaults:
        """Return what an adapter brings beside its weights, or raise why it cannot be read."""
        return await self.driver.defaults(model)

    async def scorer(self, model: ServedModel) -> Scorer:
        """Return the score head of a model that classifies, or raise what `AdapterTexts.scorer` does."""
        return await self.driver.scorer(model)

    @property
    def max_queue(self) -> int:
        """Sequences that may wait."""
        return self.driver.max_queue

    @property
    def usual_pooling(self) -> Pooling | None:
        """Return the pooling of requests that name none; None: they must."""
        return self.driver.deployed.pooling or self.pooling_of_base

    @property
    def usual_model(self) -> str:
        """Return the model of requests that name none: the one that the caller's key opens, else the base."""
        opened = ACCESS.get().models or ()
        return next(iter(opened)) if len(opened) == 1 else self.driver.deployed.served_model_name

    @property
    def poolings(self) -> tuple[Pooling, ...]:
        """Return the poolings that requests may name."""
        return OF_ENCODERS if self.limits.encodes else OF_DECODERS

    @property
    def score_pooling(self) -> Pooling:
        """Return the pooling of the state that score heads read."""
        return Pooling.CLS if self.limits.encodes else Pooling.LAST

    @property
    def default_max_tokens(self) -> int | None:
        """New tokens of a request that sets no limit; None: as many as fit."""
        return self.driver.deployed.request_default_max_tokens

    @property
    def parsers(self) -> Parsers:
        """Return the parsers of chat answers."""
        deployed = self.driver.deployed
        return self.parsers_of(deployed.tool_parser, deployed.reasoning_parser)

    @contextmanager
    def _working(self) -> Iterator[None]:
        self._in_work += 1
        try:
            yield
        finally:
            self._in_work -= 1

    async def look_up(self, request: Request) -> tuple[ResolvedModel, AdapterDefaults]:
        """Return the model of a request and its defaults, for an API that needs them before it submits the
        request.

        A request that ends here is followed like one that ends in `generate`. Raise what `generate` does.
        """
        with self.following_to_its_end(request):
            served = await self.choose(request)
            return served, await self.defaults(served.model)

    @contextmanager
    def following_to_its_end(self, request: Request) -> Iterator[None]:
        """Follow a request that ends within the block, before `generate` has it; one that does not is not."""
        try:
            yield
        except BaseException:
            with following(request, self.watchers) as follower:
                served = request.model.served
                follower.record.model = served.model if served else None
                raise

    def _terms(self, request: Request, defaults: AdapterDefaults) -> Terms:
        text, usual = defaults.text or self.text, self.default_max_tokens
        return Terms(request, defaults, text, self.limits, usual, self.logprobs_mode)


def _answers(terms: Terms, submission: Submission, outputs: Outputs) -> dict[str, Answer]:
    """Return the answers of a request by the ids of their sequences."""
    request, output, tokens = terms.request, terms.request.output, submission.prompt
    where = output.constraint.where if output.constraint else ""
    stop_tokens = frozenset(request.sampling.stop_token_ids) - terms.ends
    answers: dict[str, Answer] = {}
    for index, (seq_id, view) in enumerate(outputs.views.items()):
        stops = StopTexts(request.sampling.stop, keep=request.sampling.include_stop_str_in_output)
        detokenizer = terms.text.detokenizer(
            tokens, skip_special_tokens=output.skip_special_tokens, visible=output.shown_special_tokens
        )
        answers[seq_id] = Answer(index, submission, view, detokenizer, stops, stop_tokens, where)
    return answers


def _events(
    arrived: Mapping[str, Seq[StepOutput]], answers: Mapping[str, Answer], outputs: Outputs
) -> Iterator[Event]:
    """Turn outputs into events; the sequence of an answer is let go as soon as that is finished."""
    for seq_id, each in arrived.items():
        answer = answers[seq_id]
        yield from answer.advance(each)
        if answer.finished:
            outputs.drop(seq_id)


def _sink(
    answers: Mapping[str, Answer],
    follower: RequestFollower,
    sink: Sink[AnswerDelta],
    arrived: Mapping[str, Seq[StepOutput]],
) -> bool:
    """Hand over outputs that only have tokens; False where there are others, or the client has no room."""
    for each in arrived.values():
        if each[-1].finish is not None or each[0].first:
            return False
    if not sink.has_room():
        return False
    for seq_id, each in arrived.items():
        delta = answers[seq_id].more(each)
        follower.see(delta)
        sink.take(delta)
    return True
