"""The engine of a replica: its runner, and the sizes of cache and steps, measured where a GPU runs them."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final, TypeAlias, cast

import structlog
import torch

from inference_service.adapters.loader import ProofReplay
from inference_service.core.adapter import Adapter
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence
from inference_service.engine.backends.base import LoraBackend
from inference_service.engine.backends.triton_lora import TritonLora
from inference_service.engine.engine import Engine
from inference_service.engine.execution.graph_runner import GraphRunner
from inference_service.engine.execution.graphs import CudaRecorder
from inference_service.engine.execution.parts import PartRunner
from inference_service.engine.execution.runner import Blocks, Runner
from inference_service.engine.models.encoder import Encoder
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.engine.scheduling.residents import Residents
from inference_service.startup.bank import OpenBank
from inference_service.startup.base import LoadedBase
from inference_service.startup.memory import (
    MAX_DRIVER_BYTES,
    SCRATCH_BLOCKS,
    CudaMemory,
    Measured,
    blocks_of,
    divide_memory,
    largest_step,
    measure,
    measure_graph,
)
from loramux_shared.bases.memory import GB
from loramux_shared.bundle.generation import Generation
from loramux_shared.ports import registered
from loramux_shared.process import report
from loramux_shared.runtime import Pooling
from loramux_shared.settings import InferenceSettings

log = structlog.get_logger()

MAX_MEASURED_ADAPTERS: Final = 64
"""Adapters that take part in the step by which memory is measured, at most."""
PART_S: Final = 0.004
"""Seconds after which a step of an encoder on a CPU pauses."""

NewRunner: TypeAlias = Callable[[LoadedBase, LoraBackend, Blocks, int, SchedulerLimits, int], Runner]
"""Makes a runner as `runner_of` does."""
BuildEngine: TypeAlias = Callable[
    [InferenceSettings, Generation, LoadedBase, OpenBank | None], tuple[Engine, SchedulerLimits]
]
"""Makes an engine as `build_engine` does."""


def build_engine(
    settings: InferenceSettings,
    generation: Generation,
    base: LoadedBase,
    bank: OpenBank | None,
    *,
    new_runner: NewRunner | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Engine, SchedulerLimits]:
    """Size the cache from what is free, the longest sequence from the cache, and make the engine.

    new_runner makes the runner of its steps; None for `runner_of`. clock is in seconds.
    """
    model, backend = base.model, base.backend
    sizes = settings.sizes(model.device.type, generation.drafted)
    block_size = settings.block_size
    lora = backend.new_lora() if bank is None else bank.lora
    residents: Residents = Residents() if bank is None else bank.residency
    resident = [] if bank is None else bank.residency.resident()[:MAX_MEASURED_ADAPTERS]

    encodes, generates = model.config.encodes, model.config.generates

    def limits_of(longest: int) -> SchedulerLimits:
        return SchedulerLimits(
            max(sizes.tokens, longest) if encodes else sizes.tokens,
            sizes.seqs,
            settings.max_batch_adapters,
            longest,
            # a state that took in a token which did not hold cannot be cut back
            speculative_tokens=sizes.speculative if generates and not model.config.state_bytes(1) else 0,
            whole=encodes,
            part_s=PART_S if encodes and model.device.type == "cpu" else math.inf,
            prefill_first=settings.prefill_first,
        )

    def measured(longest: int) -> Measured:
        of_step = limits_of(longest)
        batch = largest_step(of_step, resident, block_size)
        scratch = partial(runner_of, base, lora, SCRATCH_BLOCKS, block_size, of_step)
        memory = CudaMemory(model.device)
        step = measure(scratch, batch, memory)
        return replace(step, graph=measure_graph(scratch, memory), free=memory.settled().free)

    plan = divide_memory(
        settings,
        generation.max_seq_len,
        model,
        lora.num_bytes,
        promised=0 if bank is None else bank.promised,
        graphs=backend.recordable,
        measure=measured if model.device.type == "cuda" and generates else None,
    )
    limits = replace(limits_of(plan.max_seq_len), max_seqs=plan.seqs)
    blocks = blocks_of(plan, model.config, settings)
    runner = (new_runner or runner_of)(base, lora, plan.blocks, block_size, limits, plan.slots)
    if backend.recordable:
        _record(runner, model.device)
        for proofs in registered("replay", ProofReplay).values() if base.host is None else ():
            proofs.rehearse(backend.new_lora(), model, block_size)
    return Engine(runner, limits, blocks, residents, clock, lookup=base.lookup), limits


def run_a_few_tokens(engine: Engine, bank: OpenBank | None, *, generates: bool) -> None:
    """Run what works as long as anything does: the base, and an adapter where one is resident."""
    resident: list[Adapter] = [] if bank is None else bank.residency.resident()
    sampling, pooling = SamplingParams(max_tokens=2 if generates else 0), None if generates else Pooling.MEAN
    for adapter in [None, *resident[:1]]:
        engine.add(Sequence("warm-up", [0, 0], sampling, adapter, pooling=pooling))
        while not engine.idle:
            engine.step()


def runner_of(
    base: LoadedBase,
    lora: LoraBackend,
    blocks: Blocks,
    block_size: int,
    limits: SchedulerLimits,
    slots: int = 1,
) -> Runner:
    """Return a runner with a cache of its own; one that can replay steps has recorded none yet."""
    model = base.model
    depth = 0 if limits.speculative_tokens else None  # a draft follows tokens that are known
    if base.host is not None:
        recorded = limits if base.backend.recordable else None
        return base.host.runner(model, lora, blocks, block_size, recorded, slots, depth)
    if base.backend.recordable:
        segmented = cast(TritonLora, lora)  # what `recordable` promises
        recorder = CudaRecorder(model.device)
        return GraphRunner(model, segmented, blocks, block_size, limits, recorder, slots, depth=depth)
    if isinstance(model, Encoder) and math.isfinite(limits.part_s):
        return PartRunner(model, lora, blocks, block_size, limits.part_s)
    return Runner(model, lora, blocks, block_size, slots, depth=depth)


def _record(runner: Runner, device: torch.device) -> None:
    memory = CudaMemory(device)
    before = memory.settled()
    report("recording steps")
    runner.capture()
    taken = before.growth(memory.settled(), MAX_DRIVER_BYTES)
    log.info("memory", item="recorded steps", gb=round(taken / GB, 3))
