"""The draft model at work: sequences as it follows them, in a cache of its own."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence as Seq
from dataclasses import dataclass, replace
from typing import Final

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, Chunk, Sequence
from inference_service.engine.execution.runner import Pending, StepRunner
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.blocks import BlockUse

WARMING: Final = 8
"""Tokens of a draft while it is warmed up."""


@dataclass
class Followed:
    """A sequence as the draft model has it: without adapter and grammar, drawn by the same request."""

    own: Sequence
    known: int = 0
    """Leading tokens that are those of the sequence; behind them are drafts of the last time."""
    strange: bool = False
    """True if it has tokens that the draft model does not know."""


class DraftModel:
    """Proposes tokens by a model that has no adapters.

    A draft is drawn as the sequence's own tokens are, with its seed and at its place, so that it is more often
    the token that the base draws than the most likely one would be. Rejected tokens are overwritten.
    """

    def __init__(
        self,
        runner: StepRunner,
        blocks: BlockManager,
        vocab: int,
        longest: int,
        noted: Callable[[int, float], None] = lambda _, __: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take what runs it; tokens from vocab on are unknown to it or to the base, and longest is in tokens.

        noted hears of the rows of each of its steps, and what that took.
        """
        self.noted = noted
        self._runner = runner
        self._blocks = blocks
        self._vocab = vocab
        self._longest = longest
        self._clock = clock
        self._followed: dict[Sequence, Followed] = {}

    @property
    def cache(self) -> tuple[BlockUse, ...]:
        """Return what the blocks of each group of layers are used for."""
        return self._blocks.inspect()

    def rows(self, seq: Sequence) -> int | None:
        """Return the rows that come before a draft; None where there is no room, or it does not know a token.

        Called when all tokens of the sequence are known.
        """
        followed = self._follow(seq)
        return None if followed is None else followed.own.progress.num_pending

    def catch_up(self, lengths: Mapping[Sequence, int]) -> None:
        """Compute the next rows of sequences that are behind, of each fewer than all."""
        began_s = self._clock()
        self._submit({self._followed[seq].own: rows for seq, rows in lengths.items()}).tokens()
        self.noted(sum(lengths.values()), self._clock() - began_s)

    def propose(self, requested: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Return up to so many tokens for each of sequences whose rows are known."""
        each = {self._followed[seq].own: (seq, count) for seq, count in requested.items()}
        each = {own: of for own, of in each.items() if self._blocks.grow(own, len(own.progress.tokens) + of[1])}
        submitted: deque[Pending] = deque()
        for place in range(max((count for _, count in each.values()), default=0)):
            owns = [own for own, (_, count) in each.items() if count > place]
            began_s, lengths = self._clock(), {own: own.progress.num_pending for own in owns}
            submitted.append(self._submit(lengths))
            for own in owns:
                own.progress.in_flight += 1
            if len(submitted) > self._runner.depth:
                _take(submitted.popleft())
            for pending in submitted:
                pending.finish()
            self.noted(sum(lengths.values()), self._clock() - began_s)
        while submitted:
            _take(submitted.popleft())
        drafts: dict[Sequence, list[int]] = {}
        for own, (seq, _) in each.items():
            tokens = own.progress.tokens[self._followed[seq].known :]
            drafts[seq] = tokens[: next((at for at, token in enumerate(tokens) if token >= self._vocab), None)]
        return drafts

    def warm_up(self) -> None:
        """Take the steps that drafts of a few sequences take, until each is as fast as it becomes."""
        for number in (1, 2, 4, 8):
            params = SamplingParams(max_tokens=WARMING, temperature=0.0)
            seqs = [Sequence("warm-up", [0] * WARMING, params) for _ in range(number)]
            for _ in range(2):
                known = [seq for seq in seqs if self.rows(seq)]
                self.propose(dict.fromkeys(known, WARMING))
            for seq in seqs:
                self.forget(seq)

    def forget(self, seq: Sequence) -> None:
        """Free what is held of a sequence."""
        followed = self._followed.pop(seq, None)
        if followed is not None:
            self._blocks.release(followed.own)

    def _follow(self, seq: Sequence) -> Followed | None:
        """Return a sequence as it is now, drafts that did not hold left out."""
        tokens, followed = seq.progress.tokens, self._followed.get(seq)
        if followed is None:
            sampling = replace(seq.sampling, logprobs=None, prompt_logprobs=None)
            own = Sequence(seq.id, seq.prompt, sampling, cache_salt=seq.cache_salt)
            followed = Followed(own)
        own, known = followed.own, followed.known
        followed.strange |= max(tokens[known:], default=0) >= self._vocab
        if followed.strange or len(tokens) >= self._longest:
            return None
        progress = own.progress
        held = _common(progress.tokens, tokens, known)
        progress.tokens[known:] = tokens[known:]
        followed.known = len(tokens)
        if seq not in self._followed:
            if not self._blocks.start(own):
                return None
            self._followed[seq] = followed
        else:
            progress.num_computed = min(progress.num_computed, held, len(tokens) - 1)
        if not self._blocks.grow(own, len(tokens)):
            return None
        self._blocks.register(own)
        return followed

    def _submit(self, lengths: Mapping[Sequence, int]) -> Pending:
        pending = self._runner.submit(Batch(tuple(Chunk(own, length) for own, length in lengths.items())))
        for own, length in lengths.items():
            own.progress.num_computed += length
        return pending


def _take(pending: Pending) -> None:
    for own, token in pending.tokens():
        own.progress.tokens.append(token.id)
        own.progress.in_flight -= 1


def _common(old: Seq[int], new: Seq[int], known: int) -> int:
    """Return how many leading tokens are the same; known of them are."""
    most = min(len(old), len(new))
    return next((at for at in range(known, most) if old[at] != new[at]), most)
