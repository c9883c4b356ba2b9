"""The launches of a step on a GPU, counted without one.

A model of 8B's shape lies on torch's device "meta", where tensors have shapes and no memory; the graph runner
records and runs its steps there, and launches are noted and not run. So the counts are those of the code that
serves. Sizes are the defaults: adapters of rank 64 at most, 64 of them in a step.

    python -m benchmarks.counts

1. Launches that a layer waits for, one after the other, with adapters and without.
2. Programs of shrink and expand that are launched, and those with work, on rows of adapters or of the base; how
   many are launched for each with work, and at most; tiles of expand that follow one another.
3. Rows that a step computes, and rows that it was asked for.
4. Kinds of requests, and whether their steps are replayed from a recorded graph, or from a trace on the host.
5. How often a row of logits is read for a draw, one reading after the other, by how many programs at once.
"""

import math
import os
import statistics
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any, Final
from unittest.mock import patch

import torch

from benchmarks.on_gpu.model import LLAMA_8B, QWEN3_30B_A3B, RandomTensors, config_of
from inference_service.core.adapter import Adapter, Mixture
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, Chunk, Sequence as EngineSequence
from inference_service.engine.backends.triton import TritonOperations
from inference_service.engine.backends.triton_lora import TritonLora
from inference_service.engine.execution import runner
from inference_service.engine.execution.graph_runner import GraphRunner
from inference_service.engine.execution.graphs import Graph
from inference_service.engine.execution.runner import lay_out
from inference_service.engine.execution.tape import launches_of, names_of
from inference_service.engine.kernels.launch import Launch, intercepted, kernels_of
from inference_service.engine.kernels.sampling import RowParams, SamplingTables, launch as sampling, pack_rows
from inference_service.engine.kernels.sampling.tuning import RACE
from inference_service.engine.kernels.sgmv import PLACES, Slices
from inference_service.engine.kernels.sgmv.tuning import width_of
from inference_service.engine.lora.vocabulary import Factors, OwnTable, Vocabulary
from inference_service.engine.models.decoder import Decoder
from inference_service.engine.scheduling.queues import SchedulerLimits
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.memory import RECORDED_ROWS, buckets, mixed_buckets
from loramux_shared.runtime import Rounding
from loramux_shared.settings import STEP_SIZES

META: Final = torch.device("meta")
DTYPE: Final = torch.bfloat16
LAYERS: Final = 2
"""The second tells what each of many launches."""
MAX_RANK: Final = 64
MAX_ADAPTERS: Final = 64
LONGEST: Final = 8192
BLOCK_SIZE: Final = 16
LIMITS: Final = SchedulerLimits(STEP_SIZES["cuda"].tokens, MAX_ADAPTERS, MAX_ADAPTERS, LONGEST)
"""With fewer seats than the default, which has the same kinds of steps."""
ONCE_PER_LAYER: Final = ("rope_write_kernel", "rope_write_update_kernel")
EXPANDING: Final = ("expand_kernel", "rope_write_update_kernel", "activated_update_kernel")
DECODES: Final = (1, 2, 4, 8, 16, 32, 64)
PROMPTS: Final = (64, 512, 1100)
STEPS: Final = ((8, False), (32, False), (64, False), (64, True), (512, True))
"""Rows of steps, and whether they are prompts, one an adapter; else each has a row, and the base the rest."""
ADAPTERS: Final = (1, 2, 4, 8, 64)
RANKS: Final[dict[str, tuple[int, ...]]] = {"8": (8,), "16": (16,), "64": (64,), "8-64": (8, 16, 32, 64)}
"""Adapters have them in turn, in every module."""
OWN_TOKENS: Final = 8
VOCAB: Final = LLAMA_8B["vocab_size"]
DRAWS: Final = {
    "temperature": RowParams(1.0),
    "top-p 0.9": RowParams(1.0, top_p=0.9),
    "top-k 50, top-p 0.9": RowParams(1.0, top_k=50, top_p=0.9),
}


@dataclass
class Noted:
    """A recorder and its graphs, whose replays are counted."""

    replays: int = 0

    def capture(self, work: Callable[[], None]) -> Graph:
        """Do it once."""
        work()
        return self

    def replay(self) -> None:
        """Count."""
        self.replays += 1


class Counted:
    """A runner whose launches are noted."""

    def __init__(self, config: ModelConfig, quantization: Rounding = Rounding.NONE) -> None:
        operations = TritonOperations(config.heads, DTYPE, META)
        self.lora = TritonLora(config.groups, config.dims.num_layers, DTYPE, META)
        self.lora.open(1 << 30, MAX_RANK, MAX_ADAPTERS)
        self.recorder = Noted()
        model = Decoder(config, RandomTensors(DTYPE, META), operations, quantization)
        self.runner = GraphRunner(model, self.lora, LONGEST, BLOCK_SIZE, LIMITS, self.recorder, slots=1)

    @classmethod
    def of(cls, shape: Mapping[str, Any], layers: int = LAYERS, **options: Rounding) -> "Counted":
        """Count the first layers of a model of this shape."""
        return cls(config_of({**shape, "num_hidden_layers": layers}), **options)

    @cache  # noqa: B019 - a process counts few models
    @torch.inference_mode()
    def launched(self, rows: int, *, mixed: bool, adapters: bool, experts: bool = True) -> list[Launch | str]:
        """Return what a step of so many rows launches, be it recorded or not.

        Raises:
            CaptureRefused: a graph cannot hold it.
        """
        step = self.step(rows, mixed=mixed, adapters=adapters, experts=experts)
        with intercepted(lambda _: None):
            step()  # what is made at first use is there when it is recorded
        return launches_of(step)

    def step(self, rows: int, *, mixed: bool, adapters: bool, experts: bool = True) -> Callable[[], None]:
        """Return what launches such a step, kernel by kernel."""
        sizes = mixed_buckets(LIMITS.max_tokens) if mixed else buckets(LIMITS.max_seqs)
        capacity = self.runner._capacity(next(size for size in sizes if size >= rows), mixed=mixed)
        buffers = self.runner._buffers_of(capacity)
        segments = buffers.segments[0] if adapters else None
        return partial(self.runner._compute, buffers, segments, experts=experts)

    def kind(self, seqs: Sequence[EngineSequence], lengths: Sequence[int]) -> str:
        """Return how a step of these sequences runs."""
        rows = lay_out(Batch(tuple(map(Chunk, seqs, lengths))), {})
        eager: list[Launch] = []
        before = self.recorder.replays
        with intercepted(eager.append), patch.object(runner, "to_host", lambda tensor: tensor):
            self.runner._launch(rows)
        attends = not set(ONCE_PER_LAYER).isdisjoint(names_of(eager))
        return "traced" if attends else "recorded" if self.recorder.replays > before else "nothing"


def per_layer(names: Sequence[str]) -> int:
    """Return the launches from one layer to the next."""
    places = [place for place, name in enumerate(names) if name in ONCE_PER_LAYER]
    return places[1] - places[0]


def launches(counted: Counted) -> Iterator[str]:
    """Yield how many launches a layer waits for."""
    yield "launches a layer waits for    base  adapters  more"
    fp8, mixture = Counted.of(LLAMA_8B, quantization=Rounding.FP8), Counted.of(QWEN3_30B_A3B)
    cases = [(counted, f"decode of {rows}", rows, False, True, "") for rows in DECODES]
    cases += [(counted, f"prompt of {rows}", rows, True, True, "") for rows in PROMPTS]
    cases += [(fp8, "decode of 8", 8, False, True, "  fp8"), (fp8, "prompt of 512", 512, True, True, "  fp8")]
    cases += [(mixture, "decode of 8, adapters", 8, False, False, "  30B-A3B")]
    cases += [(mixture, "decode of 8, experts' adapters", 8, False, True, "  30B-A3B")]
    for model, kind, rows, mixed, experts, what in cases:
        base, adapted = (
            per_layer(names_of(in_line(model.launched(rows, mixed=mixed, adapters=each, experts=experts))))
            for each in (False, True)
        )
        yield f"  {kind:<26}{base:>6}{adapted:>10}{adapted - base:>6}{what}"


def in_line(launched: Sequence[Launch | str]) -> list[Launch | str]:
    """Return those that wait for one another: not those that run beside a product."""
    return [each for each in launched if isinstance(each, str) or not each.beside]


def programs(counted: Counted) -> Iterator[str]:
    """Yield the programs of one layer, launched and with work, and the longest row of tiles of one program."""
    columns = "    shrink  with work    expand  with work  ratio  in turn"
    yield f"programs of a layer         adapters  ranks        {columns}"
    for (rows, mixed), adapters in product(STEPS, ADAPTERS):
        ranks: dict[str, list[str]] = {}
        for name in RANKS if adapters <= rows else ():
            halves, ratio = shared(counted, rows, adapters, name, mixed=mixed, whole=mixed)
            printed = "".join(
                f"{sum(each[0] for each in half):>10}{sum(map(min, half)):>11}" for half in halves
            )
            in_turn = sum(-(-tiles // min(grid, PLACES)) for grid, tiles in halves[1])
            ranks.setdefault(f"{printed}{ratio:>7.2f}{in_turn:>9}", []).append(name)
        kind = f"{'prompt' if mixed else 'decode'} of {rows}"
        for numbers, names in ranks.items():
            yield f"  {kind:<26}{adapters:>8}  {' '.join(names):<13}{numbers}"


def worst(counted: Counted) -> Iterator[str]:
    """Yield the most programs launched for each with work, over all capacities that have graphs."""
    yield "most launched for each with work      rows  adapters  ranks  ratio"
    every = {False: [*buckets(LIMITS.max_seqs)], True: [*mixed_buckets(RECORDED_ROWS)]}
    of_base = "a row each, prompts of the base"
    for mixed, whole, kind in ((False, False, "decodes"), (True, True, "prompts"), (True, False, of_base)):
        steps = (step for step in product(every[mixed], ADAPTERS, RANKS) if step[1] <= step[0])
        found = ((shared(counted, *step, mixed=mixed, whole=whole)[1], step) for step in steps)
        ratio, (rows, adapters, name) = max(found)
        yield f"  {kind:<36}{rows:>4}{adapters:>10}  {name:<5}{ratio:>7.2f}"


def shared(
    counted: Counted, rows: int, adapters: int, ranks: str, *, mixed: bool, whole: bool
) -> tuple[list[list[tuple[int, int]]], float]:
    """Return (programs, tiles) of a layer's shrinks and expands, and programs for each with work."""
    every = counted.launched(rows, mixed=mixed, adapters=True)
    each, tile = rows // adapters if whole else 1, _named(every, "shrink_kernel")[0].arguments["BLOCK_T"]
    cut = _cut(each, tile)
    own = [RANKS[ranks][index % len(RANKS[ranks])] for index in range(adapters) for _ in cut]
    lengths = adapters * cut
    runs = [*lengths, *_cut(rows - adapters * each, tile)]
    shrinks = [(math.prod(one.grid), _shrinking(one, own, lengths)) for one in _named(every, "shrink_kernel")]
    expands = [(math.prod(one.grid), _expanding(one, lengths, runs)) for one in _named(every, *EXPANDING)]
    return [shrinks, expands], sum(grid for grid, _ in shrinks + expands) / sum(map(min, shrinks + expands))


def _named(every: Sequence[Launch | str], *names: str) -> list[Launch]:
    """Return the launches of kernels for one layer."""
    found = [each for each in every if isinstance(each, Launch) and each.kernel.fn.__name__ in names]
    return found[: len(found) // LAYERS]


def _cut(rows: int, tile: int) -> list[int]:
    """Return the rows of each segment of an adapter, or of each run of the base."""
    return [min(tile, rows - first) for first in range(0, rows, tile)]


def _parts(lengths: Sequence[int], places: int) -> int:
    """Return the parts with rows of all segments, which share so many places, or one for each row."""
    places = min(places, len(lengths) * -(-sum(lengths) // len(lengths)))
    parts = [max(-(-(places - index) // len(lengths)), 1) for index in range(len(lengths))]
    return sum(-(-rows // -(-rows // each)) for rows, each in zip(lengths, parts, strict=True))


def _shrinking(launch: Launch, ranks: Sequence[int], lengths: Sequence[int]) -> int:
    """Return the tiles of parts of segments, which are of one rank each."""
    provided = launch.arguments
    tiles = [-(-rank * provided["N_SLICES"] // provided["BLOCK_R"]) for rank in ranks]
    blocks, required = provided["blocks"], -(-launch.grid[0] // sum(tiles))
    planes = -(-blocks // max(blocks // required, -(-blocks // provided["split_k"]), 1))
    rows = [rows for rows, count in zip(lengths, tiles, strict=True) for _ in range(count)]
    return int(planes * _parts(rows, launch.grid[0] // planes))


def _expanding(launch: Launch, lengths: Sequence[int], runs: Sequence[int]) -> int:
    """Return the tiles of parts of segments, or of runs of all rows."""
    provided, programs = launch.arguments, math.prod(launch.grid)
    if "p_heads" in provided:
        heads = sum(provided["SIZES"]) // provided["D"]
        return int(heads * _parts(runs, programs // (len(runs) * heads) * len(runs)))
    whole = "p_gate_up" in provided
    slices = Slices.consecutive(*provided["SIZES"][: 1 if whole else None])
    count = len(runs if whole else lengths)
    tiles = slices.tiles(width_of(slices, count, programs, provided["BLOCK_N"], provided["STEP_N"]))
    return tiles * (count if whole else _parts(lengths, programs // tiles))


def computed(_: Counted) -> Iterator[str]:
    """Yield how many rows are computed for each that is asked for."""
    yield "rows computed / asked for       mean  worst"
    sizes = list(mixed_buckets(LIMITS.max_tokens))
    of = {rows: next(size for size in sizes if size >= rows) / rows for rows in range(1, LIMITS.max_tokens + 1)}
    for first, last in ((17, 256), (257, LIMITS.max_tokens), (1, LIMITS.max_tokens)):
        ratios = [of[rows] for rows in range(first, last + 1)]
        yield f"  {f'prompts of {first} to {last}':<26}{statistics.mean(ratios):>10.3f}{max(ratios):>7.2f}"
    yield f"  {len(sizes)} capacities of prompts"


def kinds(counted: Counted) -> Iterator[str]:
    """Yield what steps each kind of request causes."""
    yield "a step with one such request  is"
    dims = config_of(LLAMA_8B).dims

    def matrix(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    rows, ids = matrix(OWN_TOKENS, dims.hidden), matrix(OWN_TOKENS, dtype=torch.int32)
    added = OwnTable(rows=rows, tokens=ids)
    own = {
        "own embeddings (LoRA)": Vocabulary(
            embedding=OwnTable(Factors(matrix(dims.vocab, 16), matrix(dims.hidden, 16)))
        ),
        "own head (LoRA)": Vocabulary(head=OwnTable(Factors(matrix(16, dims.hidden), matrix(dims.vocab, 16)))),
        "own tokens": Vocabulary(added, added, dims.vocab + OWN_TOKENS),
    }
    adapters = [Adapter(f"{slot:064x}", slot) for slot in range(MAX_ADAPTERS)]
    for slot, vocabulary in enumerate(own.values()):
        counted.lora.vocabularies.enter(slot, vocabulary)
    plain = adapters[len(own) :]
    blends = {parts: Mixture(tuple((each, 0.5) for each in plain[:parts])) for parts in (2, 3, 8)}
    scores = SamplingParams(prompt_logprobs=1)
    cases: dict[str, tuple[Adapter | Mixture | None, int, SamplingParams]] = {
        "base": (None, 1, SamplingParams()),
        "adapter": (plain[0], 1, SamplingParams()),
        **{name: (adapters[slot], 1, SamplingParams()) for slot, name in enumerate(own)},
        **{f"blend of {parts}": (blends[parts], 1, SamplingParams()) for parts in (2, 3, 8)},
        "logprobs": (plain[0], 1, SamplingParams(logprobs=5)),
        "penalties": (plain[0], 1, SamplingParams(frequency_penalty=1.0)),
        "prompt of 100": (plain[0], 100, SamplingParams()),
        "prompt of 100, own tokens": (adapters[2], 100, SamplingParams()),
        "prompt of 100, blend of 3": (blends[3], 100, SamplingParams()),
        "prompt of 100, prompt_logprobs": (plain[0], 100, scores),
        "prompt of 1100": (plain[0], 1100, SamplingParams()),
    }
    for name, (adapter, length, params) in cases.items():
        seqs = [_sequence(str(index), 1, plain[index], SamplingParams()) for index in range(7)]
        seqs.append(_sequence("one", length, adapter, params))
        yield f"  {name:<32}{counted.kind(seqs, [1] * 7 + [length])}"


def _sequence(
    name: str, length: int, adapter: Adapter | Mixture | None, params: SamplingParams
) -> EngineSequence:
    """Return one that decodes, or whose prompt is of a length."""
    seq = EngineSequence(name, [2] * max(length, 8), params, adapter)
    seq.progress.blocks = array("i", range(-(-max(length, 8) // BLOCK_SIZE)))
    seq.progress.num_computed = max(length, 8) - length
    return seq


def draws(_: Counted) -> Iterator[str]:
    """Yield how often each kind of draw reads a row of random logits: tiles at once, then by one program."""
    yield f"readings of {VOCAB} logits by  {-(-VOCAB // RACE.block)} programs  one program"
    for kind, params in DRAWS.items():
        yield f"  {kind:<32}{1:>8}{_tiles_read(params) / -(-VOCAB // RACE.block) - 1:>13.1f}"


def _tiles_read(params: RowParams) -> float:
    """Return how many tiles of a race the kernels read for a draw, in the interpreter."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)).mul_(3).to(DTYPE)
    tables = SamplingTables.allocate(1, VOCAB, "cpu")
    tables.load(torch.from_numpy(pack_rows(1, [params])))
    kernels, read = kernels_of(sampling.__name__, logits), 0

    def noted(p_row: Any, o_v: Any, m_v: Any, logits_of: Any = kernels._logits) -> Any:
        nonlocal read
        read += math.prod(map(int, o_v.shape))
        return logits_of(p_row, o_v, m_v)

    with patch.object(kernels, "_logits", noted):
        sampling.sample(logits, tables, torch.zeros(1, dtype=torch.int64))
    return read / RACE.block


def lines() -> Iterator[str]:
    """Yield the tables."""
    counted = Counted.of(LLAMA_8B)
    with intercepted(lambda _: None):
        counted.runner.capture()
    for section in (launches, programs, worst, computed, kinds, draws):
        yield from section(counted)
        yield ""


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # kernels are described, and none is compiled
    print("\n".join(lines()))
