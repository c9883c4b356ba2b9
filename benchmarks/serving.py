"""Tokens per second and time to first token over gRPC, with adapters and without, beside a peer.

Random adapters (rank 16 on all seven projections by default) on the demo's base; prompts of 64
random words, 64 new tokens each, greedy, end-of-sequence ignored; 16, 16 and 48 requests at concurrency 1, 8
and 32. Beside the servers, in turn with them: their engine alone, and as the peer transformers + PEFT with a
static mixed batch and no server; any OpenAI-compatible URL can be another. Nothing is drafted unless
LORAMUX_SPECULATIVE_TOKENS says so. Figures are medians over rounds; a table is printed last, ratios beside
their bars, and the exit status is 1 where one is missed.

    python -m benchmarks.serving
    python -m benchmarks.serving --peer-url http://127.0.0.1:8000/v1 --peer-models base,lora1,lora2
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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import save_file

from benchmarks.on_gpu.checkpoint import MODULES
from benchmarks.peer import Peer
from loramux import AsyncClient
from loramux.cli.local.tree import free_address
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

    def __init__(self, work: Path, names: Sequence[str], flags: Sequence[str], base: Path = BASE) -> None:
        self.address = free_address("127.0.0.1:50052")
        store = f"file://{work}/store"
        build_deployment(work, names, store, base)
        command = [sys.executable, "-m", "inference_service", "--store", store, "--deployment", "bench"]
        # All have one deployment, in turn: none follows it to the adapters of the next.
        command += ["--grpc", self.address, "--local-root", str(base), "--follow-interval-s", "0", *flags]
        self._log = work / f"server-{self.address.rpartition(':')[2]}.log"
        started = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stderr=log, cwd=ROOT)  # noqa: S603 - our own command
        health = [str(Path(sys.executable).parent / "loramux"), "health", self.address, "--wait", "120"]
        subprocess.run(health, check=True, capture_output=True)  # noqa: S603 - our own command
        self.start_s = time.perf_counter() - started
        self.start_mb = self.anonymous_mb

    @property
    def loaded(self) -> dict[str, object]:
        """Return the service's log line about its loading."""
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


def build_deployment(work: Path, names: Sequence[str], store: str, base: Path = BASE) -> None:
    """Build `deployment_of` these adapters through the builder service's own pipeline."""
    from builder_service.pipeline.build import build
    from builder_service.pipeline.context import BuildContext
    from builder_service.pipeline.progress import Progress
    from loramux_shared.deployment_file import parse_deployment
    from loramux_shared.sources.open import open_sources
    from loramux_shared.storage.open import open_store

    context = BuildContext(open_store(store), open_sources(local_roots=[work, base]))
    build(parse_deployment(deployment_of(work, names, base)).deployment, context, Progress(names))


def deployment_of(work: Path, names: Sequence[str], base: Path = BASE) -> dict[str, object]:
    """Return a deployment file's content: a base, and adapters of a folder."""
    adapters = {name: {"source": "LOCAL", "repo": str(work / "adapters" / name)} for name in names}
    return {
        "model_name": "bench",
        "build": {"checkpoint_repository": {"source": "LOCAL", "repo": str(base)}, "lora_adapters": adapters},
        "runtime": {"served_model_name": "base"},
    }


Run = Callable[[int, int, int], Awaitable[Figures]]
"""Concurrency, requests and seed to figures."""


@dataclass(frozen=True)
class Contender:
    """A server or an engine that is measured."""

    label: str
    run: Run


def run_of(ask: Ask, models: Sequence[str]) -> Run:
    """Ask a server for some models in turn."""

    async def run(concurrency: int, requests: int, seed: int) -> Figures:
        return await load(ask, models, concurrency, requests, seed)

    return run


def done_by(peer: Peer, models: Sequence[str]) -> Run:
    """Have a peer do it."""

    async def run(concurrency: int, requests: int, seed: int) -> Figures:
        return Figures(*await peer.load(models, prompts(requests, seed), concurrency, NEW_TOKENS))

    return run


async def measure(
    contenders: Sequence[Contender], rounds: int, loads: Sequence[tuple[int, int]] = LOADS
) -> list[list[Figures]]:
    """Every load on every contender in turn, round by round, so that all meet the same machine; medians."""
    for each in contenders:
        await each.run(8, 16, 999)  # warm up
    table: list[list[Figures]] = [[] for _ in contenders]
    for concurrency, requests in loads:
        runs: list[list[Figures]] = [[] for _ in contenders]
        for seed in range(rounds):
            for own, each in zip(runs, contenders, strict=True):
                own.append(await each.run(concurrency, requests, seed))
        for row, own in zip(table, runs, strict=True):
            row.append(
                Figures(
                    statistics.median(run.tokens_per_s for run in own),
                    statistics.median(run.first_token_s for run in own),
                )
            )
    return table


def ask_loramux(client: AsyncClient) -> Ask:
    """Return a function that sends requests over gRPC."""

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


def bandwidth_gb_s() -> float:
    """Return the bandwidth of one pass over a large array, best of ten: the roof of decoding."""
    data = torch.ones(256 * 2**20 // 4)
    best = 0.0
    for _ in range(10):
        started = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - started) / 1e9)
    return best


def main() -> int:
    """Measure, print the table, and tell by the status whether every bar was met."""
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
    # With drafts, it would be compared how often texts repeat themselves, which each adapter's do otherwise.
    os.environ.setdefault("LORAMUX_SPECULATIVE_TOKENS", "0")
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as folder:
        text, met = report(options, Path(folder))
    print(text)
    return 0 if met else 1


def report(options: argparse.Namespace, work: Path) -> tuple[str, bool]:
    """Run everything; return the table, and whether every bar was met."""
    prepare = [sys.executable, str(ROOT / "examples/prepare_base.py"), str(BASE)]
    subprocess.run(prepare, check=True, capture_output=True)  # noqa: S603 - our own script
    names = make_adapters(work / "adapters", options.loaded or options.adapters, options.rank)
    used = names[: options.adapters]
    server, bare = (Server(work, some, options.flags.split()) for some in (names, []))
    try:
        build_deployment(work, names, f"file://{work}/store")
        table = asyncio.run(_measure_all(options, work, server, bare, used))
    finally:
        server.stop()
        bare.stop()
    bars = [bar for bar in BARS if bar.over in table and bar.under in table]
    facts = [*(bar.row(table) for bar in bars), *_facts(server, bare)]
    return "\n".join([*machine(), "", *_table(table), "", *facts]), all(bar.met(table) for bar in bars)


ADAPTERS, BASE_REQUESTS, ENGINE = "loramux, adapters", "loramux, base requests", "its engine alone, adapters"
NONE_LOADED = "loramux, no adapters loaded"
PEFT, TRANSFORMERS = "transformers + PEFT, adapters", "transformers, no adapters"
Table = Mapping[str, Sequence[Figures]]
"""Figures by label."""


@dataclass(frozen=True)
class Bar:
    """The least tokens per second of one contender, relative to another."""

    what: str
    over: str
    under: str
    least: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Factors by load; 0: no bar."""

    def ratios(self, table: Table) -> list[float]:
        """Return what was found, by load."""
        pairs = zip(table[self.over], table[self.under], strict=True)
        return [over.tokens_per_s / under.tokens_per_s for over, under in pairs]

    def met(self, table: Table) -> bool:
        """Return True if it was reached at every load."""
        return all(found >= least for found, least in zip(self.ratios(table), self.least, strict=True))

    def row(self, table: Table) -> str:
        """Return a line of it."""
        found = " / ".join(f"{ratio:.2f}" for ratio in self.ratios(table))
        least = " / ".join(f"{least:g}" for least in self.least)
        return f"{self.what + ':':<46}{found}{f'   bar {least}' if any(self.least) else ''}"


BARS: Final = (
    Bar("adapters / transformers + PEFT", ADAPTERS, PEFT, (3.2, 5.5, 5.0)),
    Bar("base requests / transformers' static batch", BASE_REQUESTS, TRANSFORMERS, (2.2, 1.8, 1.7)),
    Bar("adapters / base requests, same server", ADAPTERS, BASE_REQUESTS, (0.92, 0.85, 0.88)),
    Bar("over gRPC / engine alone, adapters", ADAPTERS, ENGINE, (0.8, 0.8, 0.8)),
    Bar("base requests / no adapters loaded", BASE_REQUESTS, NONE_LOADED),
)


async def _measure_all(
    options: argparse.Namespace, work: Path, server: Server, bare: Server, used: Sequence[str]
) -> dict[str, list[Figures]]:
    async with AsyncExitStack() as stack:
        full = await stack.enter_async_context(AsyncClient(inference=server.address))
        empty = await stack.enter_async_context(AsyncClient(inference=bare.address))
        engine = stack.enter_context(Peer("peer_engine", f"file://{work}/store", "bench", BASE))
        contenders = [
            Contender(ADAPTERS, run_of(ask_loramux(full), used)),
            Contender(BASE_REQUESTS, run_of(ask_loramux(full), ["base"])),
            Contender(NONE_LOADED, run_of(ask_loramux(empty), ["base"])),
            Contender(ENGINE, done_by(engine, used)),
        ]
        for label, names in () if options.no_peft else ((PEFT, used), (TRANSFORMERS, [])):
            peer = stack.enter_context(Peer("peer_peft", BASE, work / "adapters", *names))
            contenders.append(Contender(label, done_by(peer, names)))
        if options.peer_url:
            limits = httpx.Limits(max_connections=64)
            web = await stack.enter_async_context(httpx.AsyncClient(timeout=600, limits=limits))
            models = options.peer_models.split(",")
            contenders.append(Contender(options.peer_url, run_of(ask_url(web, options.peer_url), models)))
        measured = await measure(contenders, options.rounds)
        return {each.label: row for each, row in zip(contenders, measured, strict=True)}


def machine() -> list[str]:
    """Return what is measured on, in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    versions = f"torch {torch.__version__.split('+')[0]}, Python {sys.version.split()[0]}"
    return [f"{model}, {os.cpu_count()} cores; {versions}; load average {os.getloadavg()[0]:.1f}"]


def _table(table: Table) -> list[str]:
    lines = [f"{'':<34}" + "".join(f" {f'tok/s @{c}':>11} {f'ttft @{c}':>10}" for c, _ in LOADS)]
    for label, row in table.items():
        cells = [
            f" {each.tokens_per_s:>11.0f}"
            f" {'-' if math.isnan(each.first_token_s) else f'{each.first_token_s * 1e3:.0f} ms':>10}"
            for each in row
        ]
        lines.append(f"{label:<34}{''.join(cells)}")
    return lines


def _facts(server: Server, bare: Server) -> list[str]:
    weights = sum(path.stat().st_size for path in BASE.glob("*.safetensors"))
    roof = bandwidth_gb_s()
    loaded = server.loaded
    return [
        f"{loaded['adapters']} adapters loaded, {loaded['operations']}; start to SERVING "
        f"{server.start_s:.1f} s, of which {loaded['seconds']} s after imports",
        f"anonymous memory at the start: {server.start_mb:.0f} MB, {bare.start_mb:.0f} MB without adapters; "
        f"weights on disk {weights / 1e6:.0f} MB",
        f"roof of a step: {weights / 1e6:.0f} MB of weights at {roof:.1f} GB/s = "
        f"{weights / roof / 1e6:.1f} ms, {1e9 * roof / weights:.0f} tokens/s per sequence",
    ]


if __name__ == "__main__":
    sys.exit(main())
