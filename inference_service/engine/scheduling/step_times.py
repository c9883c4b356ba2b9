"""The step-time model: the share of a step for prompts and drafts, learned from the times of steps.

No tensors, no clock.

A row of a prompt costs more the longer the context that it attends to, and by how much depends on the machine,
the model and the kernels. So the model learns from steps: the time of one that only decodes, by its number of
sequences; and the time of the others beyond that, by their rows and positions. Rows of drafts are measured
alike: by how much longer a step takes that has some than one of the same sequences without.
"""

import math
from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final, NamedTuple

MAX_STEP_RATIO: Final = 2.5
"""Largest time of a step with prompts, relative to one that only decodes the same sequences."""
MAX_BRIEF_STEP_RATIO: Final = 5.0
"""The same where all prompts under way are brief: they are over soon, and with less of a step for them seats
would stand half empty, and first tokens come late."""
MAX_BRIEF_TOKENS: Final = 512
"""Tokens of a brief prompt that were not cached, at most."""
MAX_PREFILL_STEP_S: Final = 0.5
"""Largest time of a step in which nothing decodes: a later request waits for its end."""
PROBE_INTERVAL_STEPS: Final = 64
"""Steps after which one differs, so that what was learned stays true: it decodes without prompts, or has no
drafts, or one more sequence of the background."""
MIN_CHUNK_ROWS: Final = 8
"""Rows that each chunk of a prompt has, whatever they cost: all prompts continue, and short ones soon begin."""
MIN_MEASURED_ROWS: Final = 64
"""Rows beside which what a step takes by itself is little."""
ROW_COST_DECAY: Final = 0.998
"""Decay of the known cost of rows, at every step with prompts: some 500 of them are remembered."""
DRAFT_COST_DECAY: Final = 0.9995
"""Decay of the cost of drafts, at every step without: those that cost too much are tried again some time."""
MAX_STALL_RATIO: Final = 3.0
"""Times as long as known that a step counts at most, for the machine may have done something else."""
CONTEXT_SPREAD_TOKENS: Final = 256.0
"""Tokens by which contexts must differ before what was measured says anything of their cost."""
MAX_BACKGROUND_SHARE: Final = 0.05
"""Part of a step by which sequences of the background may lengthen it."""
MAX_SMALL_STEP_RATIO: Final = 0.4
"""Part of a step that one of few rows takes, at most, where two steps take about as long as one of both."""


class StepLoad(NamedTuple):
    """The work of a step."""

    decodes: int
    """Sequences with one row."""
    rows: int
    """Rows of prompts."""
    area: float
    """Sum over these rows of the tokens that each attends to."""
    drafted: int = 0
    """Rows of drafts."""
    drafting_s: float = 0.0
    """Seconds that a draft model took before the step."""


EMPTY_LOAD: Final = StepLoad(0, 0, 0.0)


@dataclass
class _Regression:
    """The sums of a linear regression of seconds per row on context, over steps that fade."""

    weight: float = 0.0
    context: float = 0.0
    square: float = 0.0
    seconds: float = 0.0
    product: float = 0.0

    def add(self, weight: float, context: float, seconds: float) -> None:
        """Take in a step."""
        self.weight = self.weight * ROW_COST_DECAY + weight
        self.context = self.context * ROW_COST_DECAY + weight * context
        self.square = self.square * ROW_COST_DECAY + weight * context * context
        self.seconds = self.seconds * ROW_COST_DECAY + weight * seconds
        self.product = self.product * ROW_COST_DECAY + weight * context * seconds

    def line(self) -> tuple[float, float]:
        """Return the seconds of a row without a context, and what each token of a context adds."""
        context, seconds = self.context / self.weight, self.seconds / self.weight
        spread = self.square / self.weight - context * context
        slope = (self.product / self.weight - context * seconds) / (spread + CONTEXT_SPREAD_TOKENS**2)
        slope = min(max(0.0, slope), seconds / context if context else 0.0)
        return seconds - slope * context, slope


class TimesByKind:
    """The times of steps, by kind."""

    def __init__(self) -> None:
        self.known: dict[Hashable, float] = {}
        self.learned_at: dict[Hashable, int] = {}
        """When it was learned last."""

    def learn(self, kind: Hashable, took: float, now: int) -> None:
        """Follow what is faster sooner than what is slower, which may be chance."""
        self.learned_at[kind] = now
        known = self.known.setdefault(kind, took)
        self.known[kind] = known + (0.5 if took < known else 0.25) * (took - known)


class StepTimes:
    """Learns what steps take, and says what prompts and drafts may have of the next one."""

    def __init__(self, *, prefill_first: bool = False) -> None:
        """Know nothing yet; with prefill_first, prompts have as much of a step as where nothing decodes."""
        self._prefill_first = prefill_first
        self._submitted: deque[tuple[StepLoad, float]] = deque()
        self._resolved_s = -math.inf
        self._steps: Counter[int] = Counter()
        """Steps without prompts, by the number of sequences."""
        self._decode_s = TimesByKind()
        """Time of a step that only decodes, by the bits of the number of its sequences."""
        self._exactly_s = TimesByKind()
        """The same by the number itself: drafts cost less than what numbers of as many bits differ by."""
        self._row_parts = TimesByKind()
        """Cost of a draft's row, as a part of the step without drafts; by the number of sequences and the bits
        of the number of such rows.
        """
        self._steps_since_probe = self._calls_since_try = 0
        self._sums = _Regression()
        self._row_s = self._token_s = 0.0

    @property
    def num_submitted(self) -> int:
        """Return the steps that began and are not over."""
        return len(self._submitted)

    def room_s(self, decodes: int, times: float = MAX_STEP_RATIO) -> float | None:
        """Return the seconds that prompts may have beside so many sequences that decode; None for a step
        without prompts, from which the time of the others is learned.

        A step aims to take so many times one that only decodes.
        """
        if not decodes or self._prefill_first:
            return MAX_PREFILL_STEP_S
        decode_s = self._decode_s.known.get(decodes.bit_length())
        if decode_s is None or self._steps_since_probe >= PROBE_INTERVAL_STEPS:
            return None
        return (times - 1) * decode_s

    def decode_s(self, decodes: int) -> float | None:
        """Return what a step of so many sequences takes without drafts, where that is known."""
        return self._exactly_s.known.get(decodes)

    def spare_s(self, decodes: int) -> float:
        """Return by how long the background may lengthen a step in which so many others decode."""
        return MAX_BACKGROUND_SHARE * self._exactly_s.known.get(decodes, 0.0)

    def beside(self, decodes: int, spare_s: float) -> int:
        """Return how many more sequences may decode beside so many, and lengthen the step by no more than this.

        One more than is known to fit is tried, so that it becomes known.
        """
        known, more = self._exactly_s.known, 0
        most_s = known.get(decodes, 0.0) + spare_s
        while (took_s := known.get(decodes + more + 1)) is not None and took_s <= most_s:
            more += 1
        self._calls_since_try = (self._calls_since_try + 1) % PROBE_INTERVAL_STEPS
        return more + (took_s is None or not self._calls_since_try)

    def may_part(self, decodes: int) -> bool:
        """Return whether prompts may have a step without those that decode, which costs little more.

        True where a step's rows take most of its time, as on a CPU, and not its weights and launches.
        """
        decode_s = self._decode_s.known.get(decodes.bit_length())
        return decode_s is not None and min(self._decode_s.known.values()) <= MAX_SMALL_STEP_RATIO * decode_s

    def rows(self, context: int, seconds: float) -> float:
        """Return how many rows behind a context fit a time; MIN_CHUNK_ROWS where they do not."""
        row_s, token_s = self._row_s + self._token_s * context, self._token_s
        # The root of rows * (row_s + token_s * rows / 2) = seconds, in a form that holds for token_s = 0.
        root = row_s + math.sqrt(row_s * row_s + 2 * token_s * max(0.0, seconds))
        return max(MIN_CHUNK_ROWS, 2 * seconds / root) if root else math.inf

    def cost_s(self, context: int, rows: int) -> float:
        """Return what rows behind a context are expected to take."""
        return rows * (self._row_s + self._token_s * (context + rows / 2))

    def draft_rows(self, decodes: int, most: int) -> list[float]:
        """Return the cost of a draft's row beside so many sequences, as a part of the step without drafts.

        First that of a single row, then of 2 to 3, of 4 to 7, and so on up to most. Unknown costs are assumed
        to be together at most that of half as many; they end with the first of them that are as many as the
        sequences. None at all for a measurement of a step without drafts.
        """
        now, alone = self._steps[decodes], self._exactly_s
        if decodes not in alone.known or now - alone.learned_at[decodes] > PROBE_INTERVAL_STEPS:
            return []
        parts: list[float] = []
        for bits in range(1, most.bit_length() + 1):
            part = self._row_part(decodes, bits)
            parts.append(part if part is not None else parts[-1] / 2 if parts else min(0.1, 0.5 / decodes))
            if part is None and bits >= decodes.bit_length():
                break
        return parts

    def _row_part(self, decodes: int, bits: int) -> float | None:
        part, since = (
            self._row_parts.known.get((decodes, bits)),
            self._row_parts.learned_at.get((decodes, bits), 0),
        )
        return part and part * DRAFT_COST_DECAY ** (self._steps[decodes] - since)

    def submitted(self, load: StepLoad, now_s: float) -> None:
        """Note that a step began, and its drafts before it."""
        self._submitted.append((load, now_s + load.drafting_s))

    def resolved(self, now_s: float, *, between: bool = False) -> None:
        """Note that the oldest step that was submitted is over; its time began when the one before ended.

        With between, it is the newest, which ran between two parts of the one before it.
        """
        if between:
            load, began_s = self._submitted.pop()
            took_s = now_s - began_s
            self._submitted = deque((each, other_s + took_s) for each, other_s in self._submitted)
        else:
            load, began_s = self._submitted.popleft()
            took_s = now_s - max(began_s, self._resolved_s)
            self._resolved_s = now_s
        if load.rows:
            self._learn_rows(load, took_s)
            return
        self._steps[load.decodes] += 1
        if load.drafted:
            self._learn_drafts(load.decodes, load.drafted, took_s)
        else:
            self._learn_decode(load.decodes, took_s)

    def forget_steps(self) -> None:
        """Note that no step is under way any more, for one failed."""
        self._submitted.clear()

    def _learn_decode(self, decodes: int, took_s: float) -> None:
        self._steps_since_probe = 0
        took_s = min(took_s, MAX_STALL_RATIO * self._decode_s.known.get(decodes.bit_length(), math.inf))
        self._decode_s.learn(decodes.bit_length(), took_s, self._steps[decodes])
        self._exactly_s.learn(decodes, took_s, self._steps[decodes])

    def _learn_drafts(self, decodes: int, rows: int, took_s: float) -> None:
        alone_s = self._exactly_s.known[decodes]
        part = max(0.0, took_s / alone_s - 1) / rows if alone_s else 0.0
        self._row_parts.learn((decodes, rows.bit_length()), part, self._steps[decodes])

    def _learn_rows(self, load: StepLoad, took_s: float) -> None:
        """Take what a step took beyond a decode as its rows' cost."""
        decode_s = self._decode_s.known.get(max(1, load.decodes).bit_length())
        if decode_s is None and (load.decodes or load.rows < MIN_MEASURED_ROWS):
            return  # what the step itself took would count as its rows'
        per_row_s = max(0.0, took_s - (decode_s or 0.0)) / load.rows
        context = load.area / load.rows
        if usual_s := self._row_s + self._token_s * context:
            per_row_s = min(per_row_s, MAX_STALL_RATIO * usual_s)
        self._sums.add(load.rows, context, per_row_s)
        self._row_s, self._token_s = self._sums.line()
        self._steps_since_probe += bool(load.decodes)
