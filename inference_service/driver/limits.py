"""Limits of models and keys on a replica: requests above them are refused here, before the engine.

How the engine's tokens are shared, and how many answers it computes at once, is the scheduler's: it gets the
queue of a sequence and its share.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from inference_service.core.sequence import FAIR, Sequence as EngineSequence, Share
from inference_service.core.served_model import ServedModel
from loramux_shared.access.keys import Access
from loramux_shared.deployment import ModelLimits
from loramux_shared.faults import RateLimited
from loramux_shared.runtime import Limits

MINUTE_S: Final = 60.0
ROUNDING_S: Final = 1e-6
UNBOUNDED: Final = Limits()
FEW_METERS: Final = 256
"""Number of meters that are kept without a search for idle ones."""


class UsageMeter:
    """The usage of one model, or of one key.

    Tokens are counted as the time in which they come back: a minute's worth is in use when that is a minute
    away (the generic cell rate algorithm, a token bucket without a timer).
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._paid_s = clock()
        """When all that was used has come back."""
        self._waiting: set[Ticket] = set()
        """Requests that no step had begun with when they were last looked at."""

    @property
    def idle(self) -> bool:
        """True when a new meter would say the same."""
        return not self._waiting and self._paid_s <= self._clock()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their first step."""
        self._waiting = {ticket for ticket in self._waiting if not ticket.began}
        return len(self._waiting)

    def enter(self, ticket: Ticket) -> None:
        """Count a request."""
        self._waiting.add(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Stop counting a request."""
        self._waiting.discard(ticket)

    def take(self, tokens: int, per_minute: int) -> None:
        """Note that tokens were used."""
        self._paid_s = max(self._paid_s, self._clock()) + tokens * MINUTE_S / per_minute

    def wait_s(self, per_minute: int) -> float:
        """Return the seconds until there is a token that may be used; 0 while there is one."""
        wait_s = self._paid_s - self._clock() - MINUTE_S + MINUTE_S / per_minute
        return wait_s if wait_s > ROUNDING_S else 0.0


@dataclass(frozen=True)
class _Bound:
    """A meter with its limits, and whose they are."""

    owner: str
    meter: UsageMeter
    limits: Limits

    def check_waiting(self) -> None:
        most = self.limits.max_waiting
        if most is not None and self.meter.num_waiting >= most:
            raise RateLimited(f"{most} requests of {self.owner} wait already. Retry in a moment.")

    def check_tokens(self) -> None:
        most = self.limits.tokens_per_minute
        if most is not None and (wait_s := self.meter.wait_s(most)):
            seconds = math.ceil(wait_s)
            message = f"{self.owner} has used its {most} tokens per minute. Retry in {seconds} s."
            raise RateLimited(message, retry_after_s=wait_s)

    def take(self, tokens: int) -> None:
        if self.limits.tokens_per_minute is not None:
            self.meter.take(tokens, self.limits.tokens_per_minute)


@dataclass(eq=False)
class Ticket:
    """One request that was let in."""

    flow: str
    """Queue of its sequences: the model's, or the key's own in the model."""
    share: Share
    bounds: Sequence[_Bound]
    key_id: str = ""
    """API key of the request."""
    _seq: EngineSequence | None = field(default=None, init=False)

    @property
    def began(self) -> bool:
        """True from the first step for it."""
        return self._seq is not None and self._seq.progress.began_s is not None

    def check_tokens(self) -> None:
        """Raise RateLimited where others have used up the tokens of a minute before the engine is given
        anything.
        """
        for bound in self.bounds:
            bound.check_tokens()

    def submitted(self, first: EngineSequence) -> None:
        """Note the sequence of the first answer: it has the prompt, and tells when the request begins."""
        self._seq = first
        self.take(first.num_prompt)

    def take(self, tokens: int) -> None:
        """Note that tokens were used."""
        for bound in self.bounds:
            bound.take(tokens)


class Limiter:
    """Lets requests in; used on the event loop alone.

    What one model or key uses is never counted against another. Limits that change hold for new requests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._meters: dict[tuple[str, str], UsageMeter] = {}
        self._most_meters = FEW_METERS

    @contextmanager
    def admit(self, model: ServedModel, access: Access, limits: ModelLimits) -> Iterator[Ticket]:
        """Let a request for a model in, until the end of the block; limits are the deployment's now.

        Raises:
            RateLimited: as many wait as may, or the tokens of a minute are used up.
        """
        self._forget_idle()
        names, of_key = model.names, access.limits or UNBOUNDED
        of_models = [limits.of(name) for name in names]
        of_model = of_models[0] if len(names) == 1 else _least(of_models)
        bounds = [
            _Bound(owner, self._meter(kind, name), own)
            for kind, name, owner, own in (
                *(
                    ("model", name, f"model {name!r}", each)
                    for name, each in zip(names, of_models, strict=True)
                ),
                ("key", access.key_id, f"the API key {access.key_id!r}", of_key),
            )
            if own.max_waiting is not None or own.tokens_per_minute is not None
        ]
        for bound in bounds:
            bound.check_waiting()
            bound.check_tokens()
        own = of_key.weight is not None or of_key.max_running is not None
        together = "+".join(sorted(names))
        flow = f"{together}/{access.key_id}" if own else together
        share = _share(of_model, of_key)
        if access.background:
            flow, share = f"{flow}/background", replace(share, background=True)
        ticket = Ticket(flow, share, bounds, access.key_id)
        for bound in bounds:
            bound.meter.enter(ticket)
        try:
            yield ticket
        finally:
            for bound in bounds:
                bound.meter.leave(ticket)

    def _forget_idle(self) -> None:
        """Forget meters, where there are many; one that a request has found is in use before the next looks."""
        if len(self._meters) >= self._most_meters:
            self._meters = {key: meter for key, meter in self._meters.items() if not meter.idle}
            self._most_meters = max(FEW_METERS, 2 * len(self._meters))

    def _meter(self, kind: str, name: str) -> UsageMeter:
        found = self._meters.get((kind, name))
        if found is None:
            found = self._meters[kind, name] = UsageMeter(self._clock)
        return found


def _least(limits: Sequence[Limits]) -> Limits:
    """Return the least limits of several models: those of a blend, each of whose adapters counts."""
    weights = [each.weight for each in limits]
    running = [each.max_running for each in limits if each.max_running is not None]
    weighted = any(weight is not None for weight in weights)
    weight = min(weight or 1.0 for weight in weights) if weighted else None
    return Limits(weight=weight, max_running=min(running, default=None))


def _share(of_model: Limits, of_key: Limits) -> Share:
    """A key's weight counts within its model, and its own bound beside the model's."""
    if of_model.weight is of_model.max_running is of_key.weight is of_key.max_running is None:
        return FAIR
    running = [most for most in (of_model.max_running, of_key.max_running) if most is not None]
    return Share((of_model.weight or 1.0) * (of_key.weight or 1.0), min(running, default=None))
