"""Prompt lookup: what a sequence said before the last time it said this is what it may say next.

After "Prompt Lookup Decoding" (A. Saxena, 2023) and "Inference with Reference" (Yang et al., 2023): the last
few tokens are looked up among those before, and what followed them is drafted. A step verifies a draft by
drawing a token behind each of its tokens; all up to the first that was not drafted hold. A draw depends on
nothing but the request and the tokens before, so an answer is what it would be without drafts, sampled ones
included.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakKeyDictionary

from inference_service.core.sequence import Sequence, Token
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.plan import Plan, SchedulerLimits
from inference_service.engine.sampler import looks_back

LOOKED_UP: Final = 3
"""Tokens that must have stood together before. Fewer do so by chance too often, more miss what was changed."""
FIRST: Final = 4
"""Tokens of a first draft; one that held is followed by one of twice as many."""
LONGEST_REST: Final = 64
"""Steps without a draft after one of which nothing held, at most: first one, then twice as many each time."""

_ITEM: Final = array("i").itemsize


@dataclass
class _Said:
    """What is known of a sequence."""

    tokens: array[int] = field(default_factory=lambda: array("i"))
    size: int = FIRST
    """Of its next draft."""
    rest: int = 1
    """Steps in which it is left alone after the next draft of which nothing holds."""
    resting: int = 0
    """Steps in which it is left alone now."""


class Lookup:
    """Drafts tokens, and learns from what came of them how many are worth the rows that they take."""

    def __init__(self) -> None:
        self.drafted = 0
        """Tokens, in all steps."""
        self.accepted = 0
        """Of those, tokens that held."""
        self._said: WeakKeyDictionary[Sequence, _Said] = WeakKeyDictionary()

    def draft(self, seq: Sequence, most: int) -> list[int]:
        """Return what may follow a sequence all of whose tokens are known; at most so many tokens, or none.

        What a grammar leaves no choice about comes before what was said before; it lets pass no more of either
        than may come.
        """
        said = self._said.setdefault(seq, _Said())
        if said.resting:
            said.resting -= 1
            return []
        if seq.grammar is None:
            return self._look_up(seq, said, most)
        draft = seq.grammar.forced()[:most] or self._look_up(seq, said, most)
        return draft[: seq.grammar.draft(draft)] if draft else []

    def _look_up(self, seq: Sequence, said: _Said, most: int) -> list[int]:
        """Return what followed the last tokens when they stood together before."""
        said.tokens.extend(seq.tokens[len(said.tokens) :])
        behind = _behind(said.tokens)
        if behind is None:
            return []
        found = said.tokens[behind : behind + min(most, said.size)].tolist()
        missing, period = min(most, said.size) - len(found), len(said.tokens) - behind
        return found + [found[at % period] for at in range(period, period + missing)] if missing else found

    def fill(
        self,
        plan: Plan,
        running: Iterable[Sequence],
        limits: SchedulerLimits,
        blocks: BlockManager,
    ) -> None:
        """Fill a small step with drafts of those that decode; they take nobody's rows or blocks."""
        rows = sum(plan.lengths.values())
        room = min(limits.speculative_tokens + 1, limits.max_seqs, limits.max_tokens) - rows
        for seq in running if room > 0 else ():
            if (
                plan.lengths.get(seq) != 1
                or seq.num_pending != 1
                or seq.in_flight
                or looks_back(seq, seq.num_known)
            ):
                continue
            left = min(seq.sampling.max_tokens - seq.num_known, limits.max_seq_len - len(seq.tokens)) - 1
            most = min(room, left)
            draft = self.draft(seq, most) if most > 0 else []
            if draft and blocks.grow(seq, len(seq.tokens) + len(draft), limits.watermark):
                plan.drafts[seq] = draft
                plan.lengths[seq] += len(draft)
                room -= len(draft)

    def learn(self, seq: Sequence, drafted: int, accepted: int) -> None:
        """Note how much of a draft held."""
        self.drafted += drafted
        self.accepted += accepted
        said = self._said[seq]
        if accepted:
            said.size = 2 * drafted if accepted == drafted else accepted + 1
            said.rest = 1
        else:
            said.size = max(1, drafted // 2)
            said.resting, said.rest = said.rest, min(2 * said.rest, LONGEST_REST)


def accept(seq: Sequence) -> None:
    """Note that one more token of a draft held: it was computed, and the one behind it was drawn."""
    seq.num_computed += 1
    seq.num_charged += 1
    seq.in_flight += 1
    seq.lane.served += 1 / seq.lane.share.weight


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


def _behind(tokens: array[int]) -> int | None:
    """Return where the tokens lie that followed the last ones when they stood together before."""
    end = len(tokens) - LOOKED_UP
    if end <= 0:
        return None
    data = tokens.tobytes()
    last, before = data[end * _ITEM :], len(data) - _ITEM
    while (found := data.rfind(last, 0, before)) >= 0:
        if found % _ITEM == 0:
            return found // _ITEM + LOOKED_UP
        before = found + len(last) - 1
    return None
