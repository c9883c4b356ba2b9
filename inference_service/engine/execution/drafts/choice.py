"""The choice between prompt lookup and a draft model, and of how many tokens this one drafts.

A draft model's steps cost what they were measured to take, and its tokens hold as often as they did: of the
sequence, before it has a record of the adapter. With that the score of `Lookup` is that of a draft model too.

A sequence that the draft model has not read must be read first, which takes longer the longer it is. It is read
once its answer is so long that as many tokens more, drafted, would be worth what reading takes, and while all
that drafts took is no more than what they saved and a small share of the time. So short answers to long prompts
are left alone, and what does not pay costs next to nothing.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence as Seq
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, cast

from inference_service.core.sequence import Sequence
from inference_service.engine.execution.drafts.model import DraftModel
from inference_service.engine.scheduling.blocks import BlockUse
from inference_service.engine.scheduling.lookup import MIN_LOG_GAIN, TOKEN_LEARNING_RATE, Lookup
from inference_service.engine.scheduling.queues import Plan
from inference_service.engine.scheduling.step_times import (
    DRAFT_COST_DECAY,
    MAX_STALL_RATIO,
    MAX_STEP_RATIO,
    TimesByKind,
)

FIRST_DRAFT_PROBABILITY: Final = 0.8
"""Probability of a drafted token, while its adapter has no record."""
ADAPTER_LEARNING_RATE: Final = 0.01
"""Part that one token has in the probability of the adapter's next sequences."""
MAX_ROWS_BEFORE_DRAFT: Final = 8
"""Rows that may come before a draft, in the same step."""
STEP_TIME_DECAY: Final = 0.998
"""Decay of the known time of the draft model's steps, at every step: what took too long is tried again."""
MAX_ADAPTER_RECORDS: Final = 10_000
"""Adapters and blends with a record, at most: the oldest one makes room."""
MAX_LOSS_SHARE: Final = 0.005
"""Part of the time that drafts may take without a gain."""
MAX_SAVED_STEPS: Final = 8
"""Steps whose time drafts may have gained, and lose again."""
MIN_READ_ROWS: Final = 16
"""Rows that are read in a step, whatever they take."""
MAX_READ_ROWS: Final = 256
"""Rows that are read in a step, however fast that is."""
MAX_READING_RATIO: Final = 2
"""Times as many steps as expected, in which sequences are read that then have no drafts."""
REST_STEPS: Final = 4
"""Steps without a look at the draft model, after one that found no gain; and streams in a step for one more."""


class Candidate(NamedTuple):
    """A sequence that may have a draft of a draft model."""

    seq: Sequence
    chance: float
    """Probability of each token."""
    most: int
    """Tokens."""
    rows: int
    """Rows of the draft model before the first token."""


class Choice(NamedTuple):
    """The best drafts of candidates."""

    score: float
    candidates: int
    """How many of them have one, from the first one on."""
    tokens: int
    """Tokens of each, at most."""


def gain(chance: float, tokens: int) -> float:
    """Return the logarithm of how much faster a sequence is with a draft that takes no time."""
    return math.log(tokens + 1 if chance >= 1 else (1 - chance ** (tokens + 1)) / (1 - chance))


@dataclass(frozen=True)
class Score:
    """The score of a step's drafts, as `Lookup.choose` has it: a sum of logarithms over all streams."""

    costs: Seq[float]
    """Cost of so many rows to verify, from 1 on."""
    decodes: int
    step_s: float
    """Seconds of the step without drafts."""
    takes_s: Callable[[int], float]
    """Seconds of a step of the draft model, by its rows."""
    looked_up: Mapping[Sequence, tuple[int, float]]
    """Tokens that prompt lookup drafted, and what they gain, by sequence; a candidate's replace them."""

    def verifying_s(self, rows: int) -> float:
        """Return the seconds by which so many rows lengthen the step."""
        return self.step_s * math.expm1(self.costs[rows - 1] / self.decodes) if rows else 0.0

    def of(self, candidates: Seq[Candidate], tokens: int) -> float:
        """Return the score of a step in which candidates have drafts of up to so many tokens."""
        drafts = dict(self.looked_up)
        for seq, chance, most, _ in candidates:
            drafts[seq] = min(tokens, most), gain(chance, min(tokens, most))
        rows = sum(count for count, _ in drafts.values())
        if not rows:
            return 0.0
        if rows > len(self.costs):
            return float("-inf")
        drafting_s = 0.0
        if candidates:
            drafting_s = self.takes_s(sum(each.rows for each in candidates))
            drafting_s += (tokens - 1) * self.takes_s(len(candidates))
        longer_s = self.verifying_s(rows) + drafting_s
        return sum(gained for _, gained in drafts.values()) - self.decodes * math.log1p(longer_s / self.step_s)

    def best(self, candidates: Seq[Candidate], tokens: int) -> Choice:
        """Return what is best for all candidates, or the first half of them, or a quarter, and so on."""
        choices = (
            Choice(self.of(candidates[:count], length), count, length)
            for count in _halves(len(candidates))
            for length in range(1, tokens + 1)
        )
        return max(choices, default=Choice(float("-inf"), 0, 0))


def _halves(number: int) -> Iterator[int]:
    while number:
        yield number
        number //= 2


@dataclass
class Chance:
    """The probability of a drafted token, by the drafts before."""

    value: float = FIRST_DRAFT_PROBABILITY
    tokens: int = 0
    learned_at: int = 0
    """Step of the last of them."""

    def at(self, step: int) -> float:
        """Return the probability; what was learned long ago counts for less, so that it is tried again."""
        return 1 - (1 - self.value) * DRAFT_COST_DECAY ** (step - self.learned_at)

    def learn(self, step: int, part: float, *, held: bool) -> None:
        """Take in a token, for at least this part; of the first ones each counts as much."""
        self.tokens, self.learned_at = self.tokens + 1, step
        self.value += max(part, 1 / (self.tokens + 2)) * (held - self.value)


class DraftChoice(Lookup):
    """Prompt lookup, and a draft model where it gains more."""

    def __init__(self, model: DraftModel, tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Take the draft model and the tokens that it may draft for a sequence."""
        super().__init__()
        self._model = model
        self._tokens = tokens
        self._clock = clock
        self._chances: dict[Sequence, Chance] = {}
        self._drafted: list[tuple[Sequence, int, list[int]]] = []
        """Drafts of the last step, with their positions."""
        self._adapters: dict[str, Chance] = {}
        self._took = TimesByKind()
        self._step = self._rest = 0
        self._reads = 0
        """Steps in which sequences that are behind may be read now."""
        self._spare_s = 0.0
        """Seconds that drafts may take: what they saved, and a share of the time, without what they took."""
        model.noted = self._note

    @property
    def cache(self) -> tuple[BlockUse, ...]:
        """Return the blocks of the draft model, of each group of layers."""
        return self._model.cache

    def warm_up(self) -> None:
        """Learn what steps of the draft model take."""
        self._model.warm_up()
        self._spare_s = 0.0

    def choose(
        self, most: Mapping[Sequence, int], costs: Seq[float], plan: Plan
    ) -> Mapping[Sequence, list[int]]:
        """Return drafts of either kind."""
        looked_up = super().choose(most, costs, plan)
        decodes, began_s = len(plan.lengths), self._clock()
        step_s = plan.step_times.decode_s(decodes)
        if not step_s:
            return looked_up
        self._step += 1
        self._rest -= 1
        gains = {
            seq: (len(draft), gain(self._expected[seq].chance, len(draft))) for seq, draft in looked_up.items()
        }
        score = Score(costs, decodes, step_s, self._takes_s, gains)
        self._learn(score)
        if self._rest > 0:
            return looked_up
        chosen = self._chosen(most, score)
        drafts = self._model.propose(chosen) if chosen else {}
        for seq, draft in drafts.items():
            self._expected[seq].rest = 0
            self._drafted.append((seq, len(seq.progress.tokens), draft))
        plan.drafting_s = self._clock() - began_s
        return {**looked_up, **drafts}

    def forget(self, seq: Sequence) -> None:
        """Drop what is known of a sequence."""
        super().forget(seq)
        self._chances.pop(seq, None)
        self._model.forget(seq)

    def _chosen(self, most: Mapping[Sequence, int], score: Score) -> dict[Sequence, int]:
        """Return how many tokens to draft for which sequences; read one that is behind, if that pays."""
        found = [each for seq, room in most.items() if (each := self._candidate(seq, room, score.looked_up))]
        found.sort(key=lambda each: each.chance, reverse=True)
        near = [each for each in found if each.rows <= MAX_ROWS_BEFORE_DRAFT]
        least = score.of((), 0) + MIN_LOG_GAIN * score.decodes
        best = score.best(near, self._tokens)
        if best.score > least:
            self._reads = 0
            return {each.seq: min(best.tokens, each.most) for each in near[: best.candidates]}
        best = score.best([each._replace(rows=1) for each in found], self._tokens)
        behind = [each for each in found[: best.candidates] if each.rows > MAX_ROWS_BEFORE_DRAFT]
        if best.score > least and behind:
            self._read(behind, (best.score - least) / best.candidates / score.decodes, score.step_s)
        else:
            self._rest = REST_STEPS + score.decodes // REST_STEPS
        return {}

    def _candidate(
        self, seq: Sequence, room: int, looked_up: Mapping[Sequence, tuple[int, float]]
    ) -> Candidate | None:
        """Return a sequence as a candidate; None where it cannot have a draft, or looking up is as good."""
        known = self._chances.get(seq)
        if known is None:
            known = self._chances[seq] = replace(self._chance_of(seq))
        chance = known.at(self._step)
        if seq in looked_up and self._expected[seq].chance >= chance:
            return None
        rows = self._model.rows(seq) if room > 0 else None
        return None if rows is None else Candidate(seq, chance, min(room, self._tokens), rows)

    def _read(self, behind: Seq[Candidate], gained: float, step_s: float) -> None:
        """Read sequences that are behind; drafts gain each so much of a step, for all streams."""
        most, lengths = MIN_READ_ROWS, dict[Sequence, int]()
        while self._takes_s(2 * most) < (MAX_STEP_RATIO - 1) * step_s and most < MAX_READ_ROWS:
            most *= 2
        if not self._reads:
            steps = math.ceil(sum(each.rows for each in behind) / most)
            takes_s = steps * self._takes_s(most)
            if self._spare_s < 0 or gained * step_s * sum(each.seq.num_known for each in behind) < takes_s:
                return
            self._reads = MAX_READING_RATIO * steps
        for each in sorted(behind, key=lambda each: each.rows):
            if most > 0:
                lengths[each.seq] = min(most, each.rows - 1)
                most -= lengths[each.seq]
        self._model.catch_up(lengths)
        self._reads -= 1

    def _takes_s(self, rows: int) -> float:
        """Return the seconds of a step of the draft model; of unknown ones a guess that lets them be tried."""
        bits, known = rows.bit_length(), cast(dict[int, float], self._took.known)
        if not known:
            return 0.0
        near = min(known, key=lambda each: abs(each - bits))
        since = self._step - self._took.learned_at[near]
        return known[near] * STEP_TIME_DECAY**since * 2 ** ((bits - near) / 2)

    def _note(self, rows: int, took_s: float) -> None:
        bits = rows.bit_length()
        known = self._took.known.get(bits, math.inf)
        self._took.learn(bits, min(took_s, MAX_STALL_RATIO * known), self._step)
        self._spare_s -= took_s

    def _chance_of(self, seq: Sequence) -> Chance:
        digest = "" if seq.adapter is None else seq.adapter.digest
        if digest not in self._adapters and len(self._adapters) >= MAX_ADAPTER_RECORDS:
            del self._adapters[next(iter(self._adapters))]
        return self._adapters.setdefault(digest, Chance())

    def _learn(self, score: Score) -> None:
        """Take in a step, which tokens of the last drafts came, and what these took and saved."""
        rows = sum(len(draft) for _, _, draft in self._drafted)
        self._spare_s -= score.verifying_s(min(rows, len(score.costs)))
        self._spare_s = min(self._spare_s + MAX_LOSS_SHARE * score.step_s, MAX_SAVED_STEPS * score.step_s)
        for seq, start, draft in self._drafted:
            of_adapter = self._chance_of(seq)
            own = self._chances.get(seq, of_adapter)
            for drafted, came in zip(draft, seq.progress.tokens[start:], strict=False):
                held = drafted == came
                self._spare_s += held * score.step_s / score.decodes
                own.learn(self._step, TOKEN_LEARNING_RATE, held=held)
                of_adapter.learn(self._step, ADAPTER_LEARNING_RATE, held=held)
                if not held:
                    break
        self._drafted.clear()
