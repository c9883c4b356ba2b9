"""Limits of models and keys, on a clock that stands still until it is moved."""

import gc
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence, Share
from inference_service.core.served_model import ServedModel
from inference_service.driver.limits import FEW_METERS, Limiter, Ticket, UsageMeter
from loramux_shared.access.keys import EVERYTHING, Access, Scope
from loramux_shared.deployment import ModelLimits
from loramux_shared.faults import RateLimited
from loramux_shared.runtime import Limits

BASE = ServedModel("base")
A, B = (ServedModel(name, digest=name * 64) for name in "ab")


class World:
    """A limiter, and a clock."""

    def __init__(self, **limits: Any) -> None:
        self.now_s = 100.0
        self.limits = ModelLimits.model_validate(limits)
        self.limiter = Limiter(lambda: self.now_s)
        self.stack = ExitStack()

    def enter(self, model: ServedModel = A, access: Access = EVERYTHING) -> Ticket:
        return self.stack.enter_context(self.limiter.admit(model, access, self.limits))

    def ask(self, prompt: int, answer: int, model: ServedModel = A, access: Access = EVERYTHING) -> None:
        """Let a request in, answer it and let it go."""
        with self.limiter.admit(model, access, self.limits) as ticket:
            ticket.check_tokens()
            ticket.submitted(sequence(prompt))
            for _ in range(answer):
                ticket.take(1)

    def refused(self, model: ServedModel = A, access: Access = EVERYTHING) -> RateLimited:
        with pytest.raises(RateLimited) as caught, self.limiter.admit(model, access, self.limits):
            pass
        return caught.value


def sequence(prompt: int = 1, *, began: bool = False) -> Sequence:
    """A sequence that waits, or that a step has begun with."""
    seq = Sequence("0", [5] * prompt, SamplingParams(max_tokens=1))
    seq.progress.began_s = 1.0 if began else None
    return seq


def test_a_mixture_counts_for_each_of_its_adapters() -> None:
    """A blend is charged to each of its adapters, and has the tightest of their limits."""
    limits = {"a": {"tokens_per_minute": 10, "weight": 4}, "b": {"max_running": 2, "weight": 2}}
    world, mixed = World(models=limits), ServedModel("b*0.5+a", parts=(B, A))
    ticket = world.enter(mixed)
    assert (ticket.flow, ticket.share) == ("a+b", Share(2, 2))
    world.ask(6, 5, mixed)
    assert "model 'a' has used" in str(world.refused(A))
    assert "model 'a' has used" in str(world.refused(mixed))
    world.ask(6, 5, B)
    assert world.enter(ServedModel("a*0.5", parts=(B,))).flow == "b"


def holder(key_id: str, **limits: Any) -> Access:
    return Access(key_id, frozenset({Scope.INFER}), None, Limits(**limits))


def test_so_many_requests_of_a_model_may_wait() -> None:
    """A waiting request above the limit is refused; running, gone and other models' requests do not count."""
    world = World(models={"a": {"max_waiting": 2}})
    first = world.enter()
    with world.limiter.admit(A, EVERYTHING, world.limits) as second:
        second.submitted(sequence())
        assert "2 requests of model 'a' wait" in world.refused().message
        world.enter(B)
        world.enter(BASE)
    world.enter()
    assert world.refused().retry_after_s == 1.0
    first.submitted(sequence(began=True))
    world.enter()
    world.refused()
    world.stack.close()
    world.enter()


def test_tokens_of_a_minute_come_back_with_time() -> None:
    """Prompts and answers count; a refusal gives the time until the overdraft is paid back."""
    world = World(models={"a": {"tokens_per_minute": 60}})
    world.ask(prompt=20, answer=39)
    world.ask(prompt=1, answer=10)  # one token was left, and it runs to its end
    fault = world.refused()
    assert fault.retry_after_s == pytest.approx(11)
    assert "60 tokens per minute. Retry in 11 s" in fault.message
    world.ask(1000, 1000, B)
    world.now_s += 10.5
    assert world.refused().retry_after_s == pytest.approx(0.5)
    world.now_s += 0.5
    world.ask(1, 0)
    world.refused()
    world.now_s += 3600  # at most a minute's worth is ever saved
    world.ask(30, 30)
    world.refused()


def test_the_engine_gets_what_a_request_asks() -> None:
    """A flow is the model's, or the key's where it has a share; weights multiply; the lower bound holds."""
    world = World(default={"max_running": 8}, models={"a": {"weight": 3}})
    plain, base = world.enter(), world.enter(BASE)
    assert (plain.flow, plain.share) == ("a", Share(3.0, 8))
    assert (base.flow, base.share) == ("base", Share(1.0, 8))
    ticket = world.enter(A, holder("ann", weight=0.5, max_running=2))
    assert (ticket.flow, ticket.share) == ("a/ann", Share(1.5, 2))
    ticket = world.enter(BASE, holder("bob", max_running=20))
    assert (ticket.flow, ticket.share) == ("base/bob", Share(1.0, 8))
    assert world.enter(A, holder("cid", tokens_per_minute=9)).flow == "a"
    ticket = world.enter(A, replace(EVERYTHING, background=True))
    assert (ticket.flow, ticket.share) == ("a/background", Share(3.0, 8, background=True))


def num_meters() -> int:
    """Return the number of meters in memory."""
    return sum(type(each) is UsageMeter for each in gc.get_objects())


def test_meters_of_what_is_idle_are_forgotten() -> None:
    """The count of meters stays bounded, and a limit in use is not forgotten."""
    world, before = World(default={"tokens_per_minute": 600, "max_waiting": 1}), num_meters()
    world.enter(A)
    for number in range(20 * FEW_METERS):
        parts = [ServedModel(f"{half}-{number}", digest="c" * 64) for half in "xy"]
        with world.limiter.admit(ServedModel("x+y", parts=tuple(parts)), EVERYTHING, world.limits):
            world.refused(parts[0])
        world.ask(1, 0, parts[0])
        world.now_s += 0.1
    assert num_meters() - before <= 2 * FEW_METERS
    world.refused(A)
