"""Texts a second of an encoder on a CPU, adapters or none, beside transformers + PEFT and ONNX Runtime.

Random weights in the shapes of BERT-base (110M) and MiniLM-L6 (22M), float32. A text has between half of a
length and the length; all contenders get the same token ids, and the others pad a batch to its longest. Without
adapters each makes mean vectors; adapters are classifiers of rank 8 on queries and values with heads of their
own, and the texts of a batch go to one after another. A contender has the machine for seconds, for threads of
one that are awake slow the next; figures are medians of rounds. `int8` is our weights in 8 bits, and ONNX
Runtime's dynamic quantization. Last: one text of 16 tokens, alone and while 32 calls of 512 tokens are open.

    pip install onnxruntime onnx onnxscript
    python -m benchmarks.encoders --rounds 5
"""

import argparse
import asyncio
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from benchmarks.figures import machine
from benchmarks.on_gpu import checkpoint
from benchmarks.peer import load_adapters
from benchmarks.service import replica_process
from loramux import AsyncClient

SHAPES: Final[dict[str, dict[str, int]]] = {
    "110M": {},
    "22M": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12},
}
POSITIONS: Final = 512
COUNTS: Final = (8, 64)
"""Adapters."""
LABELS: Final = 3
SHORT_CALLS: Final = 200
LONG_CALLS: Final = 32
WARM_S: Final = 1.0
MEASURED_S: Final = 2.0

Texts = Sequence[Sequence[int]]
Run = Callable[[Texts], Awaitable[object]]


@dataclass(frozen=True)
class Load:
    """Texts of one call."""

    tokens: int
    texts: int

    @property
    def label(self) -> str:
        """Return the heading of its column."""
        return f"{self.texts} of {self.tokens}"

    def draw(self, seed: int) -> list[list[int]]:
        """Return texts as token ids, none of them met before."""
        rng = random.Random(f"{self.label} {seed}")
        lengths = (rng.randint(self.tokens // 2, self.tokens) for _ in range(self.texts))
        return [[rng.randrange(1000, 30000) for _ in range(length)] for length in lengths]


LOADS: Final = tuple(Load(tokens, texts) for texts in (1, 32) for tokens in (16, 128, 512))


def write_files(work: Path, shape: dict[str, int]) -> list[str]:
    """Write a base and its adapters, and build them; return their names."""
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**shape)).save_pretrained(work / "base")
    Tokenizer(WordLevel({"[UNK]": 0}, "[UNK]")).save(str(work / "base/tokenizer.json"))
    names = [f"topic{number}" for number in range(max(COUNTS))]
    for name in names:
        lora = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"], init_lora_weights=False)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            work / "base", num_labels=LABELS
        )
        get_peft_model(model, lora).save_pretrained(work / "adapters" / name)
    checkpoint.build_deployment(work, "encoders", names, POSITIONS)
    return names


def pad(texts: Texts) -> dict[str, torch.Tensor]:
    """Return a batch, padded to its longest text."""
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *([0] * (longest - len(text)))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


def ours(client: AsyncClient, names: Sequence[str]) -> Run:
    """Return calls of a replica: one for vectors, or one for each adapter of a batch, all at once."""

    async def run(texts: Texts) -> None:
        if not names:
            await client.embed("base", texts, pooling="mean", normalize=False)
            return
        shares = [texts[place :: len(names)] for place in range(min(len(names), len(texts)))]
        await asyncio.gather(*map(client.classify, names, shares))

    return run


def transformers_alone(work: Path) -> Run:
    """Return mean vectors of transformers."""
    model = transformers.AutoModel.from_pretrained(work / "base").eval()

    @torch.inference_mode()
    def run(texts: Texts) -> None:
        batch = pad(texts)
        mean(model(**batch).last_hidden_state.numpy(), batch["attention_mask"].numpy())

    return in_a_thread(run)


def with_peft(work: Path, names: Sequence[str]) -> Run:
    """Return scores of transformers + PEFT, one batch that mixes adapters."""
    base = transformers.AutoModelForSequenceClassification.from_pretrained(work / "base", num_labels=LABELS)
    model = load_adapters(base, work / "adapters", names)

    @torch.inference_mode()
    def run(texts: Texts) -> None:
        model(**pad(texts), adapter_names=[names[place % len(names)] for place in range(len(texts))])

    return in_a_thread(run)


def onnx(work: Path, kind: str) -> Run:
    """Return mean vectors of ONNX Runtime, in float32 or int8."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    exact, small = work / "float32.onnx", work / "int8.onnx"
    if not exact.exists():
        model = transformers.AutoModel.from_pretrained(work / "base", attn_implementation="eager").eval()
        batch, size = pad([[1] * 8, [1] * 6]), torch.export.Dim("texts", max=64)
        length = torch.export.Dim("length", max=POSITIONS)
        shapes = {name: {0: size, 1: length} for name in batch}
        torch.onnx.export(
            model,
            (),
            exact,
            kwargs=batch,
            dynamic_shapes=shapes,
            input_names=[*batch],
            optimize=True,
            dynamo=True,
        )
        quantize_dynamic(exact, small, weight_type=QuantType.QInt8)
    session = onnxruntime.InferenceSession(str(exact if kind == "float32" else small))

    def run(texts: Texts) -> None:
        batch = {name: tensor.numpy() for name, tensor in pad(texts).items()}
        mean(session.run(None, batch)[0], batch["attention_mask"])

    return in_a_thread(run)


def mean(states: Any, mask: Any) -> Any:
    """Return the means of states [texts, length, hidden] where a mask is one."""
    return np.einsum("tlh,tl->th", states, mask.astype(np.float32)) / mask.sum(1, keepdims=True)


def in_a_thread(run: Callable[[Texts], None]) -> Run:
    """Return a function as one that is awaited."""
    return lambda texts: asyncio.to_thread(run, texts)


async def rate(run: Run, load: Load, seed: int) -> float:
    """Return texts a second over some seconds, the first second left out."""
    seeds = itertools.count(1000 * seed)
    for least_s in (WARM_S, MEASURED_S):
        began_s, passed_s, calls = time.perf_counter(), 0.0, 0
        while passed_s <= least_s:
            await run(load.draw(next(seeds)))
            passed_s, calls = time.perf_counter() - began_s, calls + 1
    return calls * load.texts / passed_s


async def tails(client: AsyncClient, names: Sequence[str]) -> tuple[str, str]:
    """Return how long one short text takes, alone and beside long ones."""
    short, long, one = Load(16, 1), Load(512, 1), ours(client, names[:1])

    async def percentiles() -> str:
        times = []
        for seed in range(SHORT_CALLS):
            began = time.perf_counter()
            await one(short.draw(seed))
            times.append(time.perf_counter() - began)
        cuts = statistics.quantiles(times, n=100)
        return f"{1e3 * cuts[49]:.0f} ms, p99 {1e3 * cuts[98]:.0f} ms"

    async def keep_asking(place: int) -> None:
        for seed in itertools.count():
            await ours(client, names[place % len(names) :])(long.draw(seed * LONG_CALLS + place))

    alone = await percentiles()
    asking = [asyncio.create_task(keep_asking(place)) for place in range(LONG_CALLS)]
    beside = await percentiles()
    for task in asking:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    return alone, beside


async def measure(work: Path, names: Sequence[str], rounds: int) -> None:
    """Print a table of texts a second, and the tail."""
    async with AsyncExitStack() as stack:
        clients = {}
        for label, quantization in (("float32", "none"), ("int8", "int8")):
            service = replica_process(work, "encoders", dtype="float32", quantization=quantization)
            stack.enter_context(service)
            clients[label] = await stack.enter_async_context(AsyncClient(inference=service.grpc))
        runs = {f"loramux {label}": ours(client, ()) for label, client in clients.items()}
        runs |= {f"ONNX Runtime {label}": onnx(work, label) for label in clients}
        runs["transformers"] = transformers_alone(work)
        for count in COUNTS:
            runs[f"loramux, {count} adapters"] = ours(clients["float32"], names[:count])
            runs[f"PEFT, {count} adapters"] = with_peft(work, names[:count])
        found: dict[str, list[list[float]]] = {label: [[] for _ in LOADS] for label in runs}
        for seed in range(rounds):
            for label, run in runs.items():
                for load, rates in zip(LOADS, found[label], strict=True):
                    rates.append(await rate(run, load, seed))
        print(
            f"| texts/s | {' | '.join(load.label for load in LOADS)} |", f"|---|{'---|' * len(LOADS)}", sep="\n"
        )
        for label, columns in found.items():
            print(f"| {label} | {' | '.join(f'{statistics.median(rates):.3g}' for rates in columns)} |")
        alone, beside = await tails(clients["float32"], names)
        print(f"\na text of 16 tokens, alone: {alone}; beside {LONG_CALLS} calls of 512: {beside}")


def main() -> None:
    """Measure, and print a table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="separated by commas")
    options = parser.parse_args()
    print(machine(), "", sep="\n")
    for name in options.shapes.split(","):
        with tempfile.TemporaryDirectory(prefix="loramux-encoders-") as folder:
            work = Path(folder)
            print(f"{name}:", "", sep="\n")
            asyncio.run(measure(work, write_files(work, SHAPES[name]), options.rounds))


if __name__ == "__main__":
    main()
