"""All versions answer all questions, then what scores them is asked; what is kept is not asked again."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, TypeAlias

from loramux.client import AsyncClient
from loramux.mapping import completion_of
from loramux.records import Delta, Event, FinishReason, GenerateOptions, Prompt, PromptLogprobs, Started
from loramux_arena.judge import Judge, Trial, decide, sample_trial, trials, verdict
from loramux_arena.kept import AnswerFile
from loramux_arena.likelihood import of_reference, prompt_with_reference
from loramux_arena.plan import Ask, Entrant, Order, Plan, in_turns, repeats
from loramux_arena.questions import Question, with_reference
from loramux_arena.records import Answer, Failure, Likelihood, Row, Verdict, key_of
from loramux_arena.work import Patience, Work
from loramux_shared.faults import Fault, InternalFault

PATIENCE: Final = Patience()
STICKY: Final = "arena"
"""An alias stands for one of its models all along."""


Job: TypeAlias = Ask | Trial
Tell: TypeAlias = Callable[[int, int], None]
"""A callback for the new tokens, and the failed requests, after each request that ended."""


@dataclass
class Found:
    """The results so far."""

    entrants: dict[str, Entrant] = field(default_factory=dict)
    answers: dict[tuple[str, str, int], Answer] = field(default_factory=dict)
    """Answers by model, question and sample."""
    likelihoods: dict[tuple[str, str], Likelihood] = field(default_factory=dict)
    verdicts: dict[tuple[str, str, int, bool], Verdict] = field(default_factory=dict)
    """Verdicts by model, question, sample and order."""
    failures: list[Failure] = field(default_factory=list)
    again: int = 0
    """Rows that were kept from an earlier run."""
    answering_s: float = 0.0
    """Seconds in which answers came that were not kept."""
    new_tokens: int = 0
    """Tokens of the new answers."""
    waits: int = 0
    """Requests that the server had no room for at first."""


class Contest:
    """Runs a plan; what is found stands in `found`, also after it was broken off."""

    def __init__(
        self,
        client: AsyncClient,
        plan: Plan,
        questions: Sequence[Question],
        kept: AnswerFile,
        tell: Tell = lambda _tokens, _failed: None,
        order: Order | None = None,
        patience: Patience = PATIENCE,
    ) -> None:
        """Take what is wanted; order is `in_turns` unless one wants to know what others cost."""
        self._client = client
        self._plan = plan
        self._questions = questions
        self._kept = kept
        self._tell = tell
        self._order = order or in_turns
        self._patience = patience
        self._repeats = repeats(questions)
        self.found = Found()

    async def meet(self) -> None:
        """Ask every version for one token: names, templates and loads that fail do so before anything is begun.

        Raises:
            Fault: what the server says about the first version that it does not serve.
        """
        question = min(self._questions, key=lambda question: len(question.as_text))
        failed: list[Fault] = []

        def met(model: str, outcome: Entrant | Fault) -> None:
            if isinstance(outcome, Fault):
                failed.append(outcome.with_message(f"{model}: {outcome.message}"))
            else:
                self.found.entrants[model] = outcome

        work: Work[str, Entrant] = Work(
            lambda model: met_by(self._client, model, question.prompt), self._plan.concurrency, self._patience
        )
        await work.run(self._plan.models, met)
        if failed:
            raise failed[0]

    async def meet_judge(self, judge: Judge) -> None:
        """Have a judge say a letter: one that cannot is no use when all is answered.

        Raises:
            Fault: why it cannot.
        """
        failed: list[Fault] = []
        work: Work[Trial, Verdict] = Work(lambda trial: decide(judge, trial), 1, self._patience)
        await work.run(
            [sample_trial()], lambda _, outcome: failed.append(outcome) if isinstance(outcome, Fault) else None
        )
        if failed:
            raise failed[0]

    async def answer(self) -> None:
        """Have everything answered that is not kept."""
        asks = [ask for ask in self._asks() if not self._has(Answer, self._answer_key(ask), ask)]
        work = Work(self._ask, self._plan.concurrency, self._patience)
        began = time.monotonic()
        try:
            await work.run(asks, partial(self._report, "answer"))
        finally:
            self.found.answering_s += time.monotonic() - began
            self.found.waits += work.waits

    async def score_likelihoods(self) -> None:
        """Ask how likely each version finds each reference."""
        questions = with_reference(self._questions)
        asks = [
            ask
            for ask in self._order(self._plan, questions, 1)
            if not self._has(Likelihood, self._likelihood_key(ask), ask)
        ]
        await Work(self._likelihood, self._plan.concurrency, self._patience).run(
            asks, partial(self._report, "likelihood")
        )

    async def judge(self, judge: Judge) -> None:
        """Have every answer compared with the baseline's, in both orders."""
        missing = []
        for trial in self._trials():
            known = verdict(judge, trial, "C")
            row = known if trial.is_tie else self._kept.get(Verdict, known.key)
            if row is None:
                missing.append(trial)
            else:
                self.found.again += not trial.is_tie
                self._enter(replace(row, model=known.model, question=known.question, sample=known.sample))
        work: Work[Trial, Verdict] = Work(
            lambda trial: decide(judge, trial), self._plan.concurrency, self._patience
        )
        await work.run(missing, partial(self._report, "verdict"))

    def _asks(self) -> Iterator[Ask]:
        if not self._plan.max_tokens:
            return iter(())
        return self._order(self._plan, self._questions, self._plan.samples)

    def _trials(self) -> Iterator[Trial]:
        for ask in self._asks():
            baseline = self.found.answers.get((self._plan.baseline, ask.question.id, ask.sample))
            answer = self.found.answers.get((ask.model, ask.question.id, ask.sample))
            if ask.model != self._plan.baseline and baseline and answer:
                yield from trials(ask.question, baseline, answer)

    def _has(self, kind: type[Answer] | type[Likelihood], key: str, ask: Ask) -> bool:
        row: Answer | Likelihood | None = self._kept.get(kind, key)
        if row is None:
            return False
        self.found.again += 1
        if isinstance(row, Answer):
            row = replace(row, sample=ask.sample)
        self._enter(replace(row, model=ask.model, question=ask.question.id))
        return True

    def _options(self, sample: int) -> GenerateOptions:
        plan = self._plan
        return {"max_tokens": plan.max_tokens, "temperature": plan.temperature, "seed": plan.seed + sample}

    def _answer_key(self, ask: Ask, identity: str = "") -> str:
        version = identity or self.found.entrants[ask.model].identity
        return key_of(
            "answer", version, self._repeats[ask.question.id], ask.question.prompt, self._options(ask.sample)
        )

    def _likelihood_key(self, ask: Ask, identity: str = "") -> str:
        version = identity or self.found.entrants[ask.model].identity
        return key_of("likelihood", version, *prompt_with_reference(ask.question))

    async def _ask(self, ask: Ask) -> Answer:
        began = time.monotonic()
        times: list[tuple[float, int]] = []
        events: list[Event] = []
        options: GenerateOptions = {**self._options(ask.sample), "sticky_key": STICKY}
        async for event in self._client.generate(ask.model, ask.question.prompt, **options):
            events.append(event)
            if isinstance(event, Delta) and event.token_ids:
                times.append((time.monotonic() - began, len(event.token_ids)))
        done = completion_of(events)
        digest = done.started.adapter_digest
        return Answer(
            key=self._answer_key(ask, digest or done.started.model),
            model=ask.model,
            digest=digest,
            question=ask.question.id,
            sample=ask.sample,
            text=done.text,
            cut=done.reason is FinishReason.LENGTH,
            tokens=done.usage.completion_tokens,
            prompt_tokens=done.usage.prompt_tokens,
            cached_tokens=done.usage.cached_tokens,
            first_s=times[0][0] if times else None,
            per_token_s=per_token_s(times),
            seconds=time.monotonic() - began,
        )

    async def _likelihood(self, ask: Ask) -> Likelihood:
        prompt, scoring = prompt_with_reference(ask.question)
        options: GenerateOptions = {**scoring, "sticky_key": STICKY}
        done = [event async for event in self._client.generate(ask.model, prompt, **options)]
        started = started_of(done)
        tokens = [token for event in done if isinstance(event, PromptLogprobs) for token in event.tokens]
        logprob, count = of_reference(tokens, ask.question.reference or "")
        digest = started.adapter_digest
        key = self._likelihood_key(ask, digest or started.model)
        return Likelihood(key, ask.model, digest, ask.question.id, logprob, count)

    def _report(self, what: str, job: Job, outcome: Row | Fault) -> None:
        if isinstance(outcome, Fault):
            self.found.failures.append(_failure(what, job, outcome))
            self._tell(0, 1)
            return
        tokens = outcome.tokens if isinstance(outcome, Answer) else 0
        self.found.new_tokens += tokens
        self._kept.put(outcome)
        self._enter(outcome)
        self._tell(tokens, 0)

    def _enter(self, row: Row) -> None:
        match row:
            case Answer():
                self.found.answers[row.model, row.question, row.sample] = row
            case Likelihood():
                self.found.likelihoods[row.model, row.question] = row
            case Verdict():
                self.found.verdicts[row.model, row.question, row.sample, row.swapped] = row


async def met_by(client: AsyncClient, model: str, prompt: Prompt) -> Entrant:
    """Ask a version for one token.

    Raises:
        Fault: it does not answer.
    """
    options: GenerateOptions = {"max_tokens": 1, "temperature": 0.0, "sticky_key": STICKY}
    started = (await client.complete(model, prompt, **options)).started
    return Entrant(model, started.model, started.adapter_digest)


def per_token_s(times: Sequence[tuple[float, int]]) -> float | None:
    """Return the seconds per token after those that came first, of times and how many came; None of too few."""
    after = sum(count for _, count in times[1:])
    return (times[-1][0] - times[0][0]) / after if after else None


def started_of(events: Sequence[Event]) -> Started:
    """Return what a stream began with."""
    found = next((event for event in events if isinstance(event, Started)), None)
    if found is None:
        raise InternalFault("the server ended the stream without Started. Please report it.")
    return found


def _failure(what: str, job: Job, fault: Fault) -> Failure:
    model, sample = (job.answer.model, job.answer.sample) if isinstance(job, Trial) else (job.model, job.sample)
    about = "; ".join([fault.message, *map(str, fault.findings[:2])])
    return Failure(what, model, job.question.id, sample, fault.reason, about)
