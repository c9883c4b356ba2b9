"""Tokens per second and time to first token through the gRPC door, with adapters and without, beside a peer.

Random adapters (rank 16 on all seven projections unless said otherwise) on the demo's base; prompts of 64
random words, 64 new tokens each, greedy, end-of-sequence ignored; 16, 16 and 48 requests at concurrency 1, 8
and 32. The peer in the same run is transformers + PEFT with a static mixed batch and no server; any
OpenAI-compatible URL can be another. Figures are medians over rounds; a table is printed last.

    python benchmarks/serving.py
    python benchmarks/serving.py --peer-url http://127.0.0.1:8000/v1 --peer-models base,lora1,lora2
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import save_file

from benchmarks.on_gpu.checkpoint import MODULES
from loramux import AsyncClient
from loramux.cli.tree import free_address
from loramux.records import Delta

ROOT = Path(__file__).resolve().parents[1]
BASE = Path.home() / ".cache/loramux/models/SmolLM2-135M-Instruct"
LOADS = ((1, 16), (8, 16), (32, 48))
"""Concurrency and requests."""
WORDS = 64
NEW_TOKENS = 64


@dataclass(frozen=True)
class Figures:
    """One load on one server."""

    tokens_per_s: float
    first_token_s: float
    """Median; NaN where it is not measured."""


Ask = Callable[[str, str], Awaitable[tuple[int, float]]]
"""Model and prompt to tokens and seconds to the first one."""


def make_adapters(folder: Path, count: int, rank: int) -> list[str]:
    """Write random adapters in the layout of PEFT; every one changes what the base says."""
    config = json.loads((BASE / "config.json").read_text())
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    dim = hidden // heads
    sizes = {
        "hidden": hidden,
        "q": heads * dim,
        "kv": config["num_key_value_heads"] * dim,
        "inter": config["intermediate_size"],
    }
    names = [f"lora{index}" for index in range(count)]
    for seed, name in enumerate(names):
        draw = np.random.default_rng(seed)
        tensors = {}
        for layer in range(config["num_hidden_layers"]):
            for module, (inside, outside) in MODULES.items():
                key = f"base_model.model.model.layers.{layer}.{module}"
                a = draw.normal(size=(rank, sizes[inside])) / sizes[inside] ** 0.5
                b = draw.normal(size=(sizes[outside], rank)) * 0.02
                tensors[f"{key}.lora_A.weight"] = a.astype(ml_dtypes.bfloat16)
                tensors[f"{key}.lora_B.weight"] = b.astype(ml_dtypes.bfloat16)
        target = folder / name
        target.mkdir(parents=True)
        save_file(tensors, target / "adapter_model.safetensors")
        leaves = sorted(module.split(".")[1] for module in MODULES)
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
        settings |= {"target_modules": leaves, "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}
        (target / "adapter_config.json").write_text(json.dumps(settings))
    return names


def prompts(count: int, seed: int) -> list[str]:
    """Distinct prompts of ordinary words, so that no prefix is met twice."""
    draw = random.Random(seed)
    text = " ".join(path.read_text() for path in sorted((ROOT / "examples/data").glob("*.jsonl")))
    words = sorted({word for word in re.findall(r"[a-z]+", text) if len(word) > 2})
    return [" ".join(draw.choice(words) for _ in range(WORDS)) for _ in range(count)]


async def load(ask: Ask, models: Sequence[str], concurrency: int, requests: int, seed: int) -> Figures:
    """Keep concurrency requests open until all have ended."""
    gate = asyncio.Semaphore(concurrency)
    firsts: list[float] = []
    tokens = 0

    async def one(index: int, prompt: str) -> None:
        nonlocal tokens
        async with gate:
            count, first = await ask(models[index % len(models)], prompt)
        tokens += count
        firsts.append(first)

    started = time.perf_counter()
    await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts(requests, seed))))
    return Figures(tokens / (time.perf_counter() - started), statistics.median(firsts))


class Server:
    """The inference service as a process."""

    def __init__(self, work: Path, names: Sequence[str], flags: Sequence[str]) -> None:
        self.address = free_address("127.0.0.1:50052")
        store = f"file://{work}/store"
        build_deployment(work, names, store)
        command = [sys.executable, "-m", "inference_service", "--store", store, "--deployment", "bench"]
        # All have one deployment, in turn: none follows it to the adapters of the next.
        command += ["--grpc", self.address, "--local-root", str(BASE), "--follow-interval-s", "0", *flags]
        self._log = work / f"server-{len(names)}.log"
        started = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stderr=log, cwd=ROOT)  # noqa: S603 - our own command
        health = [str(Path(sys.executable).parent / "loramux"), "health", self.address, "--wait", "120"]
        subprocess.run(health, check=True, capture_output=True)  # noqa: S603 - our own command
        self.start_s = time.perf_counter() - started
        self.start_mb = self.anonymous_mb

    @property
    def loaded(self) -> dict[str, object]:
        """What the service said when it had loaded."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines()]
        return next(line for line in lines if line["event"] == "loaded")

    @property
    def anonymous_mb(self) -> float:
        """Resident memory that is not a file's."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))) / 1e3

    def stop(self) -> None:
        """End it as an operator does."""
        end_process(self._process)


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Terminate a process, or kill it where it does not end."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def build_deployment(work: Path, names: Sequence[str], store: str) -> None:
    """Build a deployment of these adapters through the builder service's own pipeline."""
    from builder_service.pipeline.build import build
    from builder_service.pipeline.context import BuildContext
    from builder_service.pipeline.progress import Progress
    from loramux_shared.deployment_file import parse_deployment
    from loramux_shared.sources.open import open_sources
    from loramux_shared.storage.open import open_store

    adapters = {name: {"source": "LOCAL", "repo": str(work / "adapters" / name)} for name in names}
    data = {
        "model_name": "bench",
        "build": {
            "checkpoint_repository": {"source": "LOCAL", "repo": str(BASE)},
            "lora_adapters": adapters,
        },
        "runtime": {"served_model_name": "base"},
    }
    context = BuildContext(open_store(store), open_sources(local_roots=[work, BASE]))
    build(parse_deployment(data).deployment, context, Progress(adapters))


@dataclass(frozen=True)
class Contender:
    """A server and the models that it is asked for."""

    label: str
    ask: Ask
    models: Sequence[str]


async def measure(contenders: Sequence[Contender], rounds: int) -> list[list[Figures]]:
    """Every load on every contender in turn, round by round, so that all meet the same machine; medians."""
    for each in contenders:
        await load(each.ask, each.models, 8, 16, seed=999)  # warm up
    table: list[list[Figures]] = [[] for _ in contenders]
    for concurrency, requests in LOADS:
        runs: list[list[Figures]] = [[] for _ in contenders]
        for seed in range(rounds):
            for own, each in zip(runs, contenders, strict=True):
                own.append(await load(each.ask, each.models, concurrency, requests, seed))
        for row, own in zip(table, runs, strict=True):
            row.append(
                Figures(
                    statistics.median(run.tokens_per_s for run in own),
                    statistics.median(run.first_token_s for run in own),
                )
            )
    return table


def ask_loramux(client: AsyncClient) -> Ask:
    """Requests through the gRPC door."""

    async def ask(model: str, prompt: str) -> tuple[int, float]:
        started, first, tokens = time.perf_counter(), 0.0, 0
        async for event in client.generate(model, prompt, max_tokens=NEW_TOKENS, ignore_eos=True):
            if isinstance(event, Delta):
                first = first or time.perf_counter() - started
                tokens += len(event.token_ids)
        return tokens, first

    return ask


def ask_url(client: httpx.AsyncClient, url: str) -> Ask:
    """Streaming completions of any OpenAI-compatible server."""

    async def ask(model: str, prompt: str) -> tuple[int, float]:
        body = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        started, first, tokens = time.perf_counter(), 0.0, 0
        async with client.stream("POST", f"{url.rstrip('/')}/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    first = first or time.perf_counter() - started
                    usage = json.loads(line[6:]).get("usage") or {}
                    tokens = usage.get("completion_tokens", tokens)
        return tokens, first

    return ask


def measure_peft(work: Path, names: Sequence[str]) -> list[float]:
    """Tokens per second of transformers + PEFT, in a process of its own."""
    command = [sys.executable, str(ROOT / "benchmarks/peer_peft.py"), str(BASE), str(work / "adapters")]
    asked = [[concurrency, prompts(concurrency, seed=0)] for concurrency, _ in LOADS]
    given = json.dumps({"names": list(names), "loads": asked, "new": NEW_TOKENS})
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)  # noqa: S603
    return [float(value) for value in json.loads(done.stdout.splitlines()[-1])]


def bandwidth_gb_s() -> float:
    """What one pass over a large array reaches, best of ten: the roof of decoding."""
    data = torch.ones(256 * 2**20 // 4)
    best = 0.0
    for _ in range(10):
        started = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - started) / 1e9)
    return best


def main() -> None:
    """Measure, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=8, help="adapters that requests use in turn")
    parser.add_argument("--loaded", type=int, help="adapters that are loaded; default: as many as are used")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peft", action="store_true", help="leave transformers + PEFT out")
    parser.add_argument("--peer-url", help="an OpenAI-compatible server, for example http://127.0.0.1:8000/v1")
    parser.add_argument("--peer-models", help="its models, separated by commas")
    parser.add_argument("--flags", default="", help="more flags for the inference service")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as folder:
        print(report(options, Path(folder)))


def report(options: argparse.Namespace, work: Path) -> str:
    """Run everything and return the table."""
    prepare = [sys.executable, str(ROOT / "examples/prepare_base.py"), str(BASE)]
    subprocess.run(prepare, check=True, capture_output=True)  # noqa: S603 - our own script
    names = make_adapters(work / "adapters", options.loaded or options.adapters, options.rank)
    used = names[: options.adapters]
    server, bare = (Server(work, some, options.flags.split()) for some in (names, []))
    try:
        labels, table = asyncio.run(_measure_all(options, server, bare, used))
        notes = _notes(table, server, bare)
    finally:
        server.stop()
        bare.stop()
    if not options.no_peft:
        for some in (used, []):
            labels.append(f"transformers + PEFT, {len(some) or 'no'} adapters")
            table.append([Figures(speed, math.nan) for speed in measure_peft(work, some)])
        notes.insert(0, f"with adapters / transformers + PEFT:         {_ratio(table, 0, -2)}")
    return "\n".join([*_machine(), "", *_table(labels, table), "", *notes])


async def _measure_all(
    options: argparse.Namespace, server: Server, bare: Server, used: Sequence[str]
) -> tuple[list[str], list[list[Figures]]]:
    async with (
        AsyncClient(inference=server.address) as full,
        AsyncClient(inference=bare.address) as empty,
        httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=64)) as web,
    ):
        contenders = [
            Contender(f"loramux, {len(used)} adapters", ask_loramux(full), used),
            Contender("loramux, base requests", ask_loramux(full), ["base"]),
            Contender("loramux, no adapters loaded", ask_loramux(empty), ["base"]),
        ]
        if options.peer_url:
            models = options.peer_models.split(",")
            contenders.append(Contender(options.peer_url, ask_url(web, options.peer_url), models))
        return [each.label for each in contenders], await measure(contenders, options.rounds)


def _machine() -> list[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    versions = f"torch {torch.__version__.split('+')[0]}, Python {sys.version.split()[0]}"
    return [f"{model}, {os.cpu_count()} cores; {versions}; load average {os.getloadavg()[0]:.1f}"]


def _table(labels: Sequence[str], table: Sequence[Sequence[Figures]]) -> list[str]:
    lines = [f"{'':<34}" + "".join(f" {f'tok/s @{c}':>11} {f'ttft @{c}':>10}" for c, _ in LOADS)]
    for label, row in zip(labels, table, strict=True):
        cells = [
            f" {each.tokens_per_s:>11.0f}"
            f" {'-' if math.isnan(each.first_token_s) else f'{each.first_token_s * 1e3:.0f} ms':>10}"
            for each in row
        ]
        lines.append(f"{label:<34}{''.join(cells)}")
    return lines


def _ratio(table: Sequence[Sequence[Figures]], over: int, under: int) -> str:
    pairs = zip(table[over], table[under], strict=True)
    return " / ".join(f"{a.tokens_per_s / b.tokens_per_s:.2f}" for a, b in pairs)


def _notes(table: Sequence[Sequence[Figures]], server: Server, bare: Server) -> list[str]:
    weights = sum(path.stat().st_size for path in BASE.glob("*.safetensors"))
    roof = bandwidth_gb_s()
    loaded = server.loaded
    return [
        f"with adapters / base requests, same server:  {_ratio(table, 0, 1)}",
        f"base requests / no adapters loaded:          {_ratio(table, 1, 2)}",
        f"{loaded['adapters']} adapters loaded, {loaded['operations']}; start to SERVING "
        f"{server.start_s:.1f} s, of which {loaded['seconds']} s after imports",
        f"anonymous memory at the start: {server.start_mb:.0f} MB, {bare.start_mb:.0f} MB without adapters; "
        f"weights on disk {weights / 1e6:.0f} MB",
        f"roof of a step: {weights / 1e6:.0f} MB of weights at {roof:.1f} GB/s = "
        f"{weights / roof / 1e6:.1f} ms, {1e9 * roof / weights:.0f} tokens/s per sequence",
    ]


if __name__ == "__main__":
    main()
