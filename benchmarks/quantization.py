"""Weights of fewer bits: memory, tokens per second through the gRPC door, and perplexity, by format in one run.

Servers of the demo's base in each format take turns, as in `benchmarks.serving`: prompts of 64 random words, 64
new tokens each, greedy, nothing drafted, at concurrency 1 and 8, asked of the base and of eight adapters of
rank 16. Perplexity is that of pages of `docs/` by the prompt log probabilities of the same servers; beside it
stands how far those are from the unrounded base's. Copies of that base in formats of few bits, which are
widened, may be measured beside them. The exit status is 1 where int8 answers less than 1.5 times as fast as
none at concurrency 1.

    python -m benchmarks.quantization --rounds 3 --checkpoint nf4=/models/SmolLM2-135M-Instruct-bnb-4bit
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.serving import (
    BASE,
    ROOT,
    Contender,
    Figures,
    Server,
    ask_loramux,
    asked,
    bandwidth_gb_s,
    make_adapters,
    measure,
)
from loramux import AsyncClient
from loramux.records import PromptLogprobs

FORMATS: Final = ("none", "int8", "int4")
LOADS: Final = ((1, 16), (8, 32))
PAGES: Final = ("architecture.md", "reference/adapters.md")
WINDOW: Final = 2000
"""Characters of a page that are read as one prompt."""
LEAST: Final = 1.5
"""Of int8 over none, at concurrency 1."""
Table = Mapping[str, Mapping[str, Sequence[Figures]]]
"""By format, then by who was asked."""


@dataclass(frozen=True)
class Text:
    """What a server says of a text."""

    logprobs: list[float]

    @property
    def perplexity(self) -> float:
        """e to the mean of what a token costs."""
        return math.exp(-sum(self.logprobs) / len(self.logprobs))

    def off(self, other: Text) -> float:
        """Return the root of the mean square of the differences of log probabilities."""
        pairs = zip(self.logprobs, other.logprobs, strict=True)
        return math.sqrt(sum((own - others) ** 2 for own, others in pairs) / len(self.logprobs))


def windows() -> list[str]:
    """Return the pages, window by window."""
    pages = [(ROOT / "docs" / page).read_text(encoding="utf-8") for page in PAGES]
    return [page[begin : begin + WINDOW] for page in pages for begin in range(0, len(page), WINDOW)]


async def read(client: AsyncClient, text: Sequence[str]) -> Text:
    """Ask for the log probabilities of windows."""
    found: list[float] = []
    for window in text:
        async for event in client.generate("base", window, max_tokens=0, prompt_logprobs=0):
            if isinstance(event, PromptLogprobs):
                found += [token.logprobs.logprob for token in event.tokens if token.logprobs]
    return Text(found)


async def measure_all(
    servers: Mapping[str, Server], names: Sequence[str], rounds: int
) -> tuple[Table, dict[str, Text]]:
    """Return speeds and texts of every server."""
    async with AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(AsyncClient(inference=server.address))
            for name, server in servers.items()
        }
        text = windows()
        texts = {name: await read(client, text) for name, client in clients.items()}
        contenders = [
            Contender(f"{name} {label}", asked(ask_loramux(client), models))
            for label, models in (("base", ["base"]), ("adapters", names))
            for name, client in clients.items()
        ]
        rows = await measure(contenders, rounds, LOADS)
    table: dict[str, dict[str, Sequence[Figures]]] = {name: {} for name in servers}
    for contender, row in zip(contenders, rows, strict=True):
        name, _, label = contender.label.partition(" ")
        table[name][label] = row
    return table, texts


def told(servers: Mapping[str, Server], table: Table, texts: Mapping[str, Text]) -> list[str]:
    """Return the lines of the table."""
    loads = [f"{label} @{concurrency}" for label in ("base", "adapters") for concurrency, _ in LOADS]
    heads = f"{'perplexity':>12}{'logprob off':>13}  weights"
    lines = [f"{'':<12}{''.join(f'{load:>14}' for load in loads)}{heads}"]
    for name, rows in table.items():
        speeds = [row[at].tokens_per_s for row in rows.values() for at in range(len(LOADS))]
        first = [row[at].tokens_per_s for row in table["none"].values() for at in range(len(LOADS))]
        cells = [f"{own:>7.0f} {own / whole:>5.2f}x" for own, whole in zip(speeds, first, strict=True)]
        text = texts[name]
        lines.append(
            f"{name:<12}{''.join(cells)}{text.perplexity:>12.2f}{text.off(texts['none']):>13.3f}  "
            f"{servers[name].loaded['weights']}, {servers[name].start_mb:.0f} MB in all, "
            f"loaded in {servers[name].loaded['seconds']} s"
        )
    return lines


def _copy(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    return name, Path(folder).resolve(strict=True)


def main() -> int:
    """Measure, print the table, and tell by the status whether the bar was met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--checkpoint",
        type=_copy,
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a copy of the base",
    )
    options = parser.parse_args()
    os.environ.setdefault("LORAMUX_SPECULATIVE_TOKENS", "0")
    prepare = [sys.executable, str(ROOT / "examples/prepare_base.py"), str(BASE)]
    subprocess.run(prepare, check=True, capture_output=True)  # noqa: S603 - our own script
    servers: dict[str, Server] = {}
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as folder:
        work = Path(folder)
        try:
            for name, base in [*((name, BASE) for name in FORMATS), *options.checkpoint]:
                own = work / name
                names = make_adapters(own / "adapters", 8, 16)
                os.environ["LORAMUX_QUANTIZATION"] = name if base is BASE else "none"
                servers[name] = Server(own, names, [], base)
            table, texts = asyncio.run(measure_all(servers, names, options.rounds))
            lines = told(servers, table, texts)
        finally:
            for server in servers.values():
                server.stop()
    ratio = table["int8"]["base"][0].tokens_per_s / table["none"]["base"][0].tokens_per_s
    tokens = len(texts["none"].logprobs)
    print("\n".join(lines))
    print(f"text: {tokens} tokens of {', '.join(PAGES)}")
    print(f"memory {bandwidth_gb_s():.1f} GB/s; load average {os.getloadavg()[0]:.1f}")
    print(f"int8 / none at concurrency 1: {ratio:.2f}   bar {LEAST}")
    return 0 if ratio >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
