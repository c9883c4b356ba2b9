"""Kernels for a GPU, compiled where there need not be one: those that the start of a replica would compile.

A model of the base's shape lies on torch's device "meta", where tensors have shapes and no memory. The runner
goes through all steps that a start records, and each launch is compiled for the GPU and not run. The folder is
what Triton looks into at a start: `TRITON_CACHE_DIR`.

The module prints what it did, or the fault, as JSON for ``loramux kernels``, whose process never imports torch.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from inference_service.adapters.loader import ProofReplay
from inference_service.engine.backends.triton import TritonOperations
from inference_service.engine.backends.triton_lora import TritonLora
from inference_service.engine.execution.graph_runner import GraphRunner
from inference_service.engine.execution.graphs import Graph
from inference_service.engine.kernels.launch import (
    ARCHITECTURES,
    Launch,
    Target,
    compiling_for,
    intercepted,
    interprets,
)
from inference_service.engine.models.decoder import Decoder
from inference_service.engine.models.packed import Kept
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.startup.choose import CACHE_DTYPES, compute_dtype
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.read import read_config
from loramux_shared.faults import Fault, SettingsInvalid
from loramux_shared.ports import registered
from loramux_shared.settings import InferenceSettings, load_settings

PREFIX: Final = "sm_"
META: Final = torch.device("meta")
SLOTS: Final = 64
BLOCKS: Final = 64
"""Slots and cache blocks of a replica that runs nothing: no kernel is another one for their number."""


class _Shapes:
    """Stands in for a checkpoint of which sizes alone count."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.device = dtype, META

    def has(self, name: str) -> bool:
        """Every tensor is there but a head, for which the embedding stands."""
        return "lm_head" not in name

    def shape(self, _name: str) -> None:
        """Every tensor has the shape that `get` takes."""

    def first(self, names: Sequence[str]) -> str:
        """Every name is there."""
        return names[0]

    def get(self, _name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor without memory, or a number, which is read."""
        return torch.empty(shape, dtype=dtype or self.dtype, device="cpu" if shape == (1,) else META)

    def kept(self, _names: Sequence[tuple[str, tuple[int, ...]]], _kind: type[Kept]) -> None:
        """No weight has few bits."""


class _Once:
    """Records nothing: the work is launched once."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """Launch it."""
        work()
        return self

    def replay(self) -> None:
        """Nothing was recorded."""


def compile_kernels(
    config: ModelConfig,
    architecture: int,
    folder: Path,
    limits: SchedulerLimits,
    *,
    max_rank: int,
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
) -> list[str]:
    """Compile into a folder, in this process; return the names of the kernels, one for each that was compiled.

    Raises:
        SettingsInvalid: kernels were made for the interpreter.
    """
    if interprets():
        raise SettingsInvalid("TRITON_INTERPRET is set: nothing would be compiled. Unset it.")
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    from triton.runtime import driver

    known: dict[int, str] = {}

    def compile_one(launch: Launch) -> None:
        kernel = launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments)
        known.setdefault(id(kernel), launch.kernel.fn.__name__)

    with ExitStack() as stack:
        stack.callback(setattr, driver, "_active", driver._active)  # `active` looks for a GPU
        driver.set_active(Target(architecture))
        contexts: tuple[AbstractContextManager[object], ...] = (
            compiling_for(architecture),
            intercepted(compile_one),
            torch.inference_mode(),
        )
        for context in contexts:
            stack.enter_context(context)
        operations = TritonOperations(config.heads, dtype, META, cache_dtype)
        lora = TritonLora(config.groups, config.dims.num_layers, dtype, META)
        lora.open(1 << 20, max_rank, max(SLOTS, limits.max_adapters))
        model = Decoder(config, _Shapes(dtype), operations)
        GraphRunner(model, lora, BLOCKS, block_size, limits, _Once()).capture()
        for proofs in registered("replay", ProofReplay).values():
            proofs.rehearse(lora, model, block_size)
    return list(known.values())


def of_base(
    base: Path, architecture: str, folder: Path, max_rank: int, max_seq_len: int | None = None
) -> list[str]:
    """Compile for a base by the settings of a replica, as `compile_kernels` does.

    Raises:
        SettingsInvalid: there are no tiles for the architecture, or a setting is wrong.
        CheckpointInvalid: it is no base that is served.
    """
    names = [f"{PREFIX}{number}" for number in ARCHITECTURES]
    if architecture not in names:
        raise SettingsInvalid(f"--arch is one of {', '.join(names)}, found {architecture!r}.")
    config, settings = read_config(base), load_settings(InferenceSettings, deployment="none")
    sizes, longest = settings.sizes("cuda"), max_seq_len or config.max_positions
    return compile_kernels(
        config,
        int(architecture.removeprefix(PREFIX)),
        folder,
        SchedulerLimits(sizes.tokens, sizes.seqs, settings.max_batch_adapters, longest),
        max_rank=max_rank,
        block_size=settings.block_size,
        dtype=compute_dtype(settings, config, torch.device("cuda")),
        cache_dtype=CACHE_DTYPES[settings.kv_cache_dtype],
    )


def main(arguments: Sequence[str]) -> None:
    """Print how many of each kernel were compiled, or the fault."""
    base, architecture, folder, *sizes = arguments
    try:
        found = of_base(Path(base), architecture, Path(folder), *map(int, sizes))
        answer: dict[str, Any] = {"kernels": dict(sorted(Counter(found).items()))}
    except Fault as fault:
        answer = {"fault": {"reason": fault.reason, "message": fault.message}}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
