"""Drafts follow what they cost and how often they hold, on a machine whose clock moves with its steps."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, Sequence, Token
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.engine import Engine
from inference_service.engine.queues import SchedulerLimits
from inference_service.engine.residents import Residents
from inference_service.engine.runner import Pending
from loramux_draft.choice import DraftChoice
from tests.support.cases import cases


@dataclass
class Machine:
    """A runner of depth 0 and a draft model: a step takes a second, and some of it for each row and draft."""

    row_s: float
    draft_s: float
    chance: float
    now_s: float = 0.0
    depth: int = 0
    noted: object = None
    read: dict[Sequence, int] = field(default_factory=dict)
    draw: random.Random = field(default_factory=lambda: random.Random(4))

    def submit(self, batch: Batch) -> Pending:
        """Draw numbers that come only once, so that prompt lookup finds nothing."""
        seqs = tuple(chunk.seq for chunk in batch.chunks for _ in range(chunk.drafted + 1))
        places = [len(c.seq.progress.tokens) + ahead for c in batch.chunks for ahead in range(c.drafted + 1)]
        self.now_s += 1.0 + self.row_s * (len(places) - len(batch.chunks))
        return Pending(seqs, lambda: [Token(place) for place in places], drafts=batch.drafts)

    def _took(self, rows: int, took_s: float) -> None:
        self.now_s += took_s
        self.noted(rows, took_s)

    def rows(self, seq: Sequence) -> int:
        return len(seq.progress.tokens) - self.read.get(seq, 0)

    def catch_up(self, lengths: Mapping[Sequence, int]) -> None:
        for seq, rows in lengths.items():
            self.read[seq] = self.read.get(seq, 0) + rows
        self._took(rows := sum(lengths.values()), self.draft_s * (1 + rows / 16))

    def propose(self, requested: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Return tokens that hold as often as they do here."""
        for place in range(max(requested.values())):
            self._took(sum(self.rows(seq) for seq in requested) if not place else len(requested), self.draft_s)
        self.read |= {seq: len(seq.progress.tokens) for seq in requested}
        return {
            seq: [
                len(seq.progress.tokens) + at if self.draw.random() < self.chance else 0 for at in range(count)
            ]
            for seq, count in requested.items()
        }

    def forget(self, seq: Sequence) -> None:
        self.read.pop(seq, None)


def speed(machine: Machine, streams: int, prompt: int) -> float:
    """Return how many times the tokens of steps without drafts come, of answers of 100 tokens."""
    limits = SchedulerLimits(4096, 64, max_adapters=2, max_seq_len=8192, speculative_tokens=8)
    choice = DraftChoice(machine, 8, clock=lambda: machine.now_s)
    blocks = BlockManager(8192, 16)
    engine = Engine(machine, limits, blocks, Residents(), clock=lambda: machine.now_s, lookup=choice)
    began_s, steps = 0.0, 0
    for answers in range(30):
        if answers == 10:
            began_s, steps = machine.now_s, 0
        for number in range(streams):
            prompt_ids = [10_000 + number * prompt + place for place in range(prompt)]
            engine.add(Sequence(f"{answers} {number}", prompt_ids, SamplingParams(max_tokens=100)))
        while not engine.idle:
            engine.step()
        steps += 100
    return steps / (machine.now_s - began_s)


@pytest.mark.parametrize(
    ("chance", "draft_s", "streams", "row_s", "prompt", "least"),
    cases(__file__, "GAINS"),
)
def test_drafts_gain_where_they_hold_and_never_cost(
    chance: float, draft_s: float, streams: int, row_s: float, prompt: int, least: float
) -> None:
    """Drafts gain where they are cheap and hold, and cost at most a fiftieth anywhere else."""
    assert speed(Machine(row_s, draft_s, chance), streams, prompt) > least
