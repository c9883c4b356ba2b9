"""The report of an arena: ranks and differences of the versions, from the results."""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Final

from loramux_arena.contest import Found
from loramux_arena.paired import FEW, Paired, compare, holm
from loramux_arena.plan import Plan
from loramux_arena.questions import Question, with_reference
from loramux_arena.records import Answer, Failure
from loramux_arena.scores import LIKELIHOOD, scorer

JUDGE: Final = "judge"


@dataclass(frozen=True)
class Standing:
    """A version: what it is, what it cost."""

    model: str
    name: str
    """Name that answered; of an alias the model that it stands for."""
    digest: str
    answers: int
    failed: int
    """Requests of it without an answer."""
    cut: int
    """Answers that ended because they had as many tokens as they may."""
    tokens: int
    first_s: float | None
    """Median of the seconds to the first token."""
    per_token_s: float | None
    """Median of the seconds per token."""
    cost: float | None
    """Tokens that were computed, of prompts and answers, in those of the baseline for the same answers."""


@dataclass(frozen=True)
class Comparison:
    """A version beside the baseline in one score, over the questions at which both have one."""

    model: str
    mean: float
    baseline_mean: float
    paired: Paired
    p_adjusted: float
    """The p-value by Holm, over the versions of this score."""


@dataclass(frozen=True)
class Score:
    """One score of all versions."""

    name: str
    baseline: float | None
    """The baseline's mean, over all of its questions; None where it has none."""
    questions: int
    """Those at which the baseline has one."""
    comparisons: tuple[Comparison, ...]
    """Comparisons in the order of the versions.

    A version without a question in common with the baseline has none.
    """
    values: Mapping[str, Mapping[str, float]]
    """Values by version and question, in their order and not in that of arrival, so that a new draw is the
    same.
    """


@dataclass(frozen=True)
class Standings:
    """A whole contest."""

    baseline: str
    questions: int
    samples: int
    standings: tuple[Standing, ...]
    scores: tuple[Score, ...]
    failures: tuple[Failure, ...]
    notes: tuple[str, ...]
    """Notes that a reader of the numbers needs."""
    tokens_per_s: float | None
    """Speed of the new answers, all versions together."""
    again: int
    """Rows that were kept from before."""


def standings(plan: Plan, questions: Sequence[Question], found: Found, judge: str = "") -> Standings:
    """Return the report; `judge` is the judge's name."""
    scores = [_score(name, plan, _by_reference(name, plan, questions, found)) for name in plan.scores]
    if plan.likelihood:
        scores.append(_score(LIKELIHOOD, plan, _likelihoods(plan, questions, found)))
    if judge:
        scores.append(_score(JUDGE, plan, _judged(plan, questions, found)))
    speed = found.new_tokens / found.answering_s if found.new_tokens and found.answering_s else None
    rows = [_standing(model, plan, found) for model in plan.models]
    return Standings(
        baseline=plan.baseline,
        questions=len(questions),
        samples=plan.samples,
        standings=tuple(rows),
        scores=tuple(scores),
        failures=tuple(found.failures),
        notes=tuple(_notes(plan, found, rows, scores, judge)),
        tokens_per_s=speed,
        again=found.again,
    )


def _likelihoods(plan: Plan, questions: Sequence[Question], found: Found) -> dict[str, dict[str, float]]:
    return {
        model: {
            question.id: row.per_token
            for question in questions
            if (row := found.likelihoods.get((model, question.id))) is not None
        }
        for model in plan.models
    }


def _by_reference(
    name: str, plan: Plan, questions: Sequence[Question], found: Found
) -> dict[str, dict[str, float]]:
    """Return means over samples; a question of which an answer is missing has none."""
    agree = scorer(name)
    values: dict[str, dict[str, float]] = {model: {} for model in plan.models}
    for model in plan.models:
        for question in with_reference(questions):
            answers = _answers(plan, found, model, question.id)
            if answers:
                reference = question.reference or ""
                values[model][question.id] = statistics.fmean(
                    float(agree(answer.text, reference)) for answer in answers
                )
    return values


def _answers(plan: Plan, found: Found, model: str, question: str) -> list[Answer]:
    """Return all samples of a version, or none where one is missing."""
    answers = [found.answers.get((model, question, sample)) for sample in range(plan.samples)]
    return [answer for answer in answers if answer is not None] if all(answers) else []


def _judged(plan: Plan, questions: Sequence[Question], found: Found) -> dict[str, dict[str, float]]:
    """Return the part of the verdicts that a version won, ties by half; the baseline has 0.5."""
    by_answer: dict[tuple[str, str], list[float]] = {}
    for (model, question, _, _), row in found.verdicts.items():
        by_answer.setdefault((model, question), []).append(row.score)
    values: dict[str, dict[str, float]] = {model: {} for model in plan.models}
    for question, model in product((each.id for each in questions), plan.models):
        scores = by_answer.get((model, question), [])
        if len(scores) == 2 * plan.samples:
            values[model][question] = statistics.fmean(scores)
            values[plan.baseline][question] = 0.5
    return values


def _score(name: str, plan: Plan, values: Mapping[str, Mapping[str, float]]) -> Score:
    base = values[plan.baseline]
    comparisons = []
    for model in plan.models:
        both = [question for question in base if question in values[model]]
        if model == plan.baseline or not both:
            continue
        comparisons.append(
            Comparison(
                model,
                statistics.fmean(values[model][question] for question in both),
                statistics.fmean(base[question] for question in both),
                paired := compare([values[model][each] - base[each] for each in both], plan.seed),
                paired.p,
            )
        )
    adjusted = holm([each.paired.p for each in comparisons])
    return Score(
        name,
        statistics.fmean(base.values()) if base else None,
        len(base),
        tuple(replace(each, p_adjusted=p) for each, p in zip(comparisons, adjusted, strict=True)),
        values,
    )


def _standing(model: str, plan: Plan, found: Found) -> Standing:
    answers = [answer for key, answer in found.answers.items() if key[0] == model]
    entrant = found.entrants.get(model)
    return Standing(
        model=model,
        name=entrant.name if entrant else model,
        digest=entrant.digest if entrant else "",
        answers=len(answers),
        failed=sum(failure.model == model for failure in found.failures),
        cut=sum(answer.cut for answer in answers),
        tokens=sum(answer.tokens for answer in answers),
        first_s=_median(answers, lambda answer: answer.first_s),
        per_token_s=_median(answers, lambda answer: answer.per_token_s),
        cost=_cost(answers, plan, found),
    )


def _median(answers: Sequence[Answer], value: Callable[[Answer], float | None]) -> float | None:
    found = [number for answer in answers if (number := value(answer)) is not None]
    return statistics.median_low(found) if found else None


def _cost(answers: Sequence[Answer], plan: Plan, found: Found) -> float | None:
    own = base = 0
    for answer in answers:
        beside = found.answers.get((plan.baseline, answer.question, answer.sample))
        if beside is not None:
            own += answer.computed
            base += beside.computed
    return own / base if base else None


def _notes(
    plan: Plan, found: Found, rows: Sequence[Standing], scores: Sequence[Score], judge: str
) -> list[str]:
    notes = []
    if scores and len(plan.models) > 2:
        notes.append(
            f"{len(plan.models) - 1} versions are compared with {plan.baseline}: p (Holm) is adjusted for that "
            "within a score, p is not"
        )
    for score in scores:
        pairs = [comparison.paired.questions for comparison in score.comparisons]
        if pairs and min(pairs) < FEW:
            notes.append(
                f"{score.name}: fewer than {FEW} questions, so intervals are narrower than they say; trust p"
            )
    for row in rows:
        digests = {answer.digest for key, answer in found.answers.items() if key[0] == row.model}
        if len(digests) > 1:
            notes.append(
                f"{row.model} was replaced meanwhile: its answers are of {len(digests)} versions. Ask again, "
                "or name one with NAME@DIGEST"
            )
        if row.answers and row.cut * 10 > row.answers:
            notes.append(
                f"{row.model}: {row.cut} of {row.answers} answers were cut off at {plan.max_tokens} tokens"
            )
    same = Counter(row.digest for row in rows if row.digest)
    for digest, count in same.items():
        if count > 1:
            names = ", ".join(row.model for row in rows if row.digest == digest)
            notes.append(f"{names} are one version: {digest[:12]}")
    if judge:
        notes += _notes_of_judge(plan, found, judge)
    return notes


def _notes_of_judge(plan: Plan, found: Found, judge: str) -> list[str]:
    pairs: dict[tuple[str, str, int], list[float]] = {}
    letters: Counter[str] = Counter()
    for (model, question, sample, _), row in found.verdicts.items():
        pairs.setdefault((model, question, sample), []).append(row.score)
        letters[row.letter] += 1
    both = [scores for scores in pairs.values() if len(scores) == 2]
    if not both:
        return []
    agreed = sum(one == other for one, other in both)
    notes = [
        f"judge {judge}: the same verdict in both orders for {agreed} of {len(both)} pairs; the answer that "
        f"stood first won {letters['A']} times, the other one {letters['B']} times"
    ]
    if judge in plan.models:
        notes.append(f"judge {judge} is one of those that are compared, and may prefer itself")
    return notes
