"""Prompt lookup: tokens that followed an earlier occurrence of a sequence's last tokens are drafted as the next
ones.

After "Prompt Lookup Decoding" (A. Saxena, 2023) and "Inference with Reference" (Yang et al., 2023): the last
few tokens are looked up among those before, and the tokens that followed them are drafted. A step verifies a
draft by drawing a token behind each of its tokens; all up to the first that was not drafted hold. A draw
depends on nothing but the request and the tokens before, so an answer is what it would be without drafts,
sampled ones included.

The length of a draft follows from the cost of rows (`StepTimes`), and from how often the expected tokens of a
sequence came, drafted or not.
"""

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence as Seq
from dataclasses import dataclass, field
from itertools import accumulate
from math import log, log1p
from typing import Final

from inference_service.core.sequence import Sequence, Token
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.blocks import BlockUse
from inference_service.engine.scheduling.queues import Plan, SchedulerLimits

LOOKED_UP_TOKENS: Final = 3
"""Tokens that must have stood together before. Fewer do so by chance too often, more miss what was changed."""
FIRST_PROBABILITY: Final = 0.5
"""Probability of an expected token, while its sequence has no record."""
TOKEN_LEARNING_RATE: Final = 0.1
"""Part that one token has in the chance of the next."""
MIN_LOG_GAIN: Final = 0.05
"""Mean logarithm of how much faster streams must be with drafts: costs are known no better."""

STREAMS_PER_REST_STEP: Final = 16
"""Streams in a step that leave one alone for a step without a draft for it, twice as many for two."""

_ITEM: Final = array("i").itemsize


@dataclass
class Expected:
    """The expected tokens of a sequence, and how often they came."""

    data: bytearray = field(default_factory=bytearray)
    """Its tokens, int32."""
    tokens: Seq[int] = ()
    """Tokens that are expected behind them."""
    forced: bool = False
    """True if a grammar leaves no choice about these, as far as it can say how they are spelt."""
    chances: list[float] = field(default_factory=lambda: [FIRST_PROBABILITY, FIRST_PROBABILITY])
    """Probabilities of a token that was looked up, and of one that is forced."""
    rest: int = 0
    """Steps in which it is left alone."""

    @property
    def chance(self) -> float:
        """Return the probability that the next one holds."""
        return self.chances[self.forced]

    def gains(self, least: float) -> Iterator[float]:
        """Yield what each token, drafted behind those before it, adds to the logarithm of the sequence's speed.

        The first that gains at most `least` is the end of them.
        """
        chance = tokens = 1.0  # chance that all tokens so far are accepted, and the expected tokens of the step
        for _ in self.tokens:
            chance *= self.chance
            gain = log1p(chance / tokens)
            if gain <= least:
                return
            yield gain
            tokens += chance

    def follow(self, tokens: Seq[int]) -> None:
        """Take in what came since; it may be more, or less, than was expected."""
        came = tokens[len(self.data) // _ITEM :]
        for token, expected in zip(came, self.tokens, strict=False):
            self.chances[self.forced] += TOKEN_LEARNING_RATE * ((token == expected) - self.chance)
            if token != expected:
                break
        self.data += array("i", came).tobytes()


class Lookup:
    """Drafts tokens where they are worth the rows that they take."""

    def __init__(self) -> None:
        self.drafted = 0
        """Tokens, in all steps."""
        self.accepted = 0
        """Tokens of those that held."""
        self._expected: dict[Sequence, Expected] = {}

    @property
    def followed(self) -> tuple[str, ...]:
        """Return the ids of the sequences that it has a record of."""
        return tuple(seq.id for seq in self._expected)

    @property
    def cache(self) -> tuple[BlockUse, ...]:
        """Return the blocks of a draft model, of each group of layers; none here."""
        return ()

    def expect(self, seq: Sequence, most: int) -> Expected:
        """Return what may follow a sequence all of whose tokens are known; at most so many tokens, or none.

        What a grammar leaves no choice about comes before what was said before.
        """
        expected = self._expected.get(seq)
        if expected is None:
            expected = self._expected[seq] = Expected()
        expected.follow(seq.progress.tokens)
        forced = seq.grammar.forced()[:most] if seq.grammar is not None else []
        expected.tokens, expected.forced = forced or _look_up(expected.data, most), bool(forced)
        return expected

    def fill(
        self, plan: Plan, running: Iterable[Sequence], limits: SchedulerLimits, blocks: BlockManager
    ) -> None:
        """Fill a step that only decodes, of known tokens, with drafts; they take nobody's rows or blocks."""
        decodes = len(plan.lengths)
        room = min(limits.max_seqs - decodes, plan.budget, decodes * limits.speculative_tokens)
        if room <= 0 or any(seq in plan.lengths for seq in plan.prompts):
            return
        parts = plan.step_times.draft_rows(decodes, room)
        room = min(room, 2 ** len(parts) - 1)
        costs = [decodes * log1p(rows * parts[rows.bit_length() - 1]) for rows in range(1, room + 1)]
        if min((cost / rows for rows, cost in enumerate(costs, 1)), default=math.inf) >= log(2):
            return  # log(2) is what a token gains that is sure to come
        most = self._most_rows(plan, running, min(limits.speculative_tokens, room))
        for seq, draft in self.choose(most, costs, plan).items():
            if seq.grammar is not None:
                draft = draft[: seq.grammar.draft(draft)]
            if draft and blocks.grow(seq, len(seq.progress.tokens) + len(draft), limits.watermark):
                plan.drafts[seq] = draft
                plan.lengths[seq] += len(draft)

    def _most_rows(self, plan: Plan, running: Iterable[Sequence], most: int) -> dict[Sequence, int]:
        """Return how many tokens may be drafted for each sequence that decodes and does not rest."""
        rows: dict[Sequence, int] = {}
        for seq in running:
            known = self._expected.get(seq)
            if known is not None and known.rest:
                known.rest -= 1
            elif plan.lengths.get(seq) == 1 and not seq.looks_back(seq.num_known):
                left = seq.progress.end - len(seq.progress.tokens)
                rows[seq] = min(most, left - 1)  # the step draws one more
        return rows

    def choose(
        self, most: Mapping[Sequence, int], costs: Seq[float], plan: Plan
    ) -> Mapping[Sequence, list[int]]:
        """Return the drafts that gain more than they cost, of sequences that may have so many tokens each.

        What streams gain is the sum of the logarithms of how much faster they are, so that many do not become
        much slower for one that becomes much faster; costs are as many logarithms, by the rows of all drafts.
        """
        decodes = len(plan.lengths)
        least = min(cost / rows for rows, cost in enumerate(costs, 1))
        gains: list[tuple[float, Sequence]] = []
        for seq, room in most.items():
            expected = self.expect(seq, room)
            expected.rest = decodes // STREAMS_PER_REST_STEP
            gains.extend((gain, seq) for gain in expected.gains(least))
        gains.sort(key=lambda each: each[0], reverse=True)
        drafts: dict[Sequence, list[int]] = {}
        for seq, rows in Counter(_worth_it(gains, costs, MIN_LOG_GAIN * decodes)).items():
            expected = self._expected[seq]
            drafts[seq], expected.rest = list(expected.tokens[:rows]), 0
        return drafts

    def forget(self, seq: Sequence) -> None:
        """Drop what is known of a sequence."""
        self._expected.pop(seq, None)

    def learn(self, drafted: int, accepted: int) -> None:
        """Note how much of a draft held."""
        self.drafted += drafted
        self.accepted += accepted


def verified(
    drawn: Iterable[tuple[Sequence, Token]], drafts: Mapping[Sequence, Seq[int]]
) -> Iterator[tuple[Sequence, Token]]:
    """Yield the tokens that hold, of those that a step drew row by row."""
    held: dict[Sequence, int] = {}
    for seq, token in drawn:
        draft, place = drafts.get(seq, ()), held.get(seq, 0)
        if place < 0:
            continue
        yield seq, token
        held[seq] = place + 1 if place < len(draft) and token.id == draft[place] else -1


def _worth_it(gains: Seq[tuple[float, Sequence]], costs: Seq[float], least: float) -> list[Sequence]:
    """Return whose rows are worth most beyond what they cost, if that is enough; largest gains first."""
    sums = accumulate(gain for gain, _ in gains)
    scores = [gained - cost for gained, cost in zip(sums, costs, strict=False)]
    best = max(scores, default=0.0)
    return [seq for _, seq in gains[: scores.index(best) + 1]] if best > least else []


def _look_up(data: bytearray, most: int) -> list[int]:
    """Return what followed the last tokens, int32, when they stood together before; at most so many tokens."""
    last, before = data[-LOOKED_UP_TOKENS * _ITEM :], len(data) - _ITEM
    if len(data) <= len(last):
        return []
    while (found := data.rfind(last, 0, before)) % _ITEM:
        if found < 0:
            return []
        before = found + len(last) - 1
    behind = found + len(last)
    following = array("i", data[behind : behind + most * _ITEM]).tolist()
    period = (len(data) - behind) // _ITEM
    return following + [following[at % period] for at in range(period, most)]
