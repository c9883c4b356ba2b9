"""Engines whose steps go through a function of a test."""

from collections.abc import Callable
from functools import partial

from inference_service.core.sequence import Batch
from inference_service.engine.backends.base import LoraBackend
from inference_service.engine.execution.runner import Blocks, Pending, Runner
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.startup.base import LoadedBase
from inference_service.startup.engine import BuildEngine, NewRunner, build_engine, runner_of

Submit = Callable[[Batch], Pending]


def runner_around(around: Callable[[Submit, Batch], Pending]) -> NewRunner:
    """Return what makes a replica's runner, of which around submits each step; it is given how."""

    def new_runner(
        base: LoadedBase,
        lora: LoraBackend,
        blocks: Blocks,
        block_size: int,
        limits: SchedulerLimits,
        slots: int,
    ) -> Runner:
        runner = runner_of(base, lora, blocks, block_size, limits, slots)
        runner.submit = partial(around, runner.submit)  # type: ignore[method-assign]
        return runner

    return new_runner


def engine_around(around: Callable[[Submit, Batch], Pending]) -> BuildEngine:
    """Return what builds a replica's engine with such a runner."""
    return partial(build_engine, new_runner=runner_around(around))


def engine_of_depth(depth: int) -> BuildEngine:
    """Return what builds a replica's engine with a runner of a depth, without recorded steps."""

    def new_runner(
        base: LoadedBase,
        lora: LoraBackend,
        blocks: Blocks,
        block_size: int,
        _limits: SchedulerLimits,
        slots: int,
    ) -> Runner:
        return Runner(base.model, lora, blocks, block_size, slots, depth=depth)

    return partial(build_engine, new_runner=new_runner)


def engine_without_time() -> BuildEngine:
    """Return what builds a replica's engine on a clock that stands still: steps depend on no machine."""
    return partial(build_engine, clock=lambda: 0.0)
