"""Long prompts beside short streams: the wait of each for the other.

Eight streams decode, alone first. Then four prompts of some thousand random tokens arrive at once, and short
requests come one at a time until all four have their first tokens. All requests are for the base and without a
key, so all share one queue. Measured in a replica of this process, without an API; the exit status is 1 where a
bar is missed. Printed without a bar: the long prompts' time, against the same with nothing else at work.

    python -m benchmarks.long_prompts
    python -m benchmarks.long_prompts --tokens 2000 --seconds 60
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from benchmarks.moving.figures import Figure, formatted, percentile
from benchmarks.moving.forge import Forge
from benchmarks.moving.replica import Local, replica

STREAMS: Final = 8
LONG: Final = 4
TOKENS: Final = 8000
"""Tokens of a long prompt: the base's context is 8192."""
SHORT: Final = 64
QUIET_S: Final = 5.0
APART_S: Final = 0.2
"""Between the first token of a short request and the next request."""
BAR_GAP: Final = 3.0
BAR_FIRST_S: Final = 2.0


@dataclass(frozen=True)
class Found:
    """The results, in seconds."""

    quiet: list[float]
    """Between two tokens of a stream with no prompts beside it, before the long ones and after them."""
    beside: list[float]
    """The same while they were under way."""
    short: list[float]
    """To the first tokens of short requests."""
    long: list[float]
    """To those of long prompts that came in time."""
    alone: list[float]
    """The same with nothing else at work."""

    def figures(self) -> list[Figure]:
        """Return what was found, beside its bars."""
        p50, p99 = ([percentile(gaps, part) for gaps in (self.beside, self.quiet)] for part in (0.5, 0.99))
        note = f"{formatted(p99, 1e3)} ms; p50 {formatted(p50, 1e3)} ms"
        requests = f"{len(self.short)} requests, p50 {percentile(self.short, 0.5):.2f} s"
        return [
            Figure("p99 between tokens, beside / alone", p99[0] / p99[1], "x", BAR_GAP, note),
            Figure(
                "p99 first token of a short request", percentile(self.short, 0.99), "s", BAR_FIRST_S, requests
            ),
            Figure(
                "last first token of long prompts",
                max(self.long, default=math.nan),
                "s",
                None,
                _done(self.long),
            ),
            Figure(
                "the same with nothing else", max(self.alone, default=math.nan), "s", None, _done(self.alone)
            ),
        ]


def _done(firsts: list[float]) -> str:
    return f"{len(firsts)} of {LONG} came"


async def _ask_long(local: Local, tokens: int, within_s: float) -> list[float]:
    """Ask all at once; return the seconds to their first tokens, of those that came in time."""
    requests = [asyncio.ensure_future(local.ask(_base(local), tokens=tokens)) for _ in range(LONG)]
    done, late = await asyncio.wait(requests, timeout=within_s)
    for each in late:
        each.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return [each.result().first_s for each in done]


async def _ask_short(local: Local, until: asyncio.Future[list[float]]) -> list[float]:
    """Ask one after the other, until something else is done."""
    firsts = []
    while not until.done():
        await asyncio.sleep(APART_S)
        firsts.append((await local.ask(_base(local), tokens=SHORT)).first_s)
    return firsts


async def measure(folder: Path, tokens: int, within_s: float) -> Found:
    """Measure, and give up the long prompts where they take longer."""
    forge = Forge(folder)
    forge.deploy("long", 1)
    async with replica(forge, "long") as local:
        async with local.streams([_base(local)] * STREAMS):
            with local.steps() as before:
                await asyncio.sleep(QUIET_S)
            with local.steps() as crowded:
                long = asyncio.ensure_future(_ask_long(local, tokens, within_s))
                short = await _ask_short(local, long)
            with local.steps() as after:
                await asyncio.sleep(QUIET_S)
        alone = await _ask_long(local, tokens, within_s)
    return Found(before.gaps_s + after.gaps_s, crowded.gaps_s, short, await long, alone)


def _base(local: Local) -> str:
    return local.ready.service.catalog.base_name


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of a long prompt")
    parser.add_argument("--seconds", type=float, default=240, help="time limit of long prompts")
    parser.add_argument("--folder", type=Path, help="keep stores here between runs; else they are temporary")
    options = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with tempfile.TemporaryDirectory(prefix="loramux-long-") as folder:
        work = options.folder or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        figures = asyncio.run(measure(work, options.tokens, options.seconds)).figures()
    print("\n".join(map(str, figures)))
    return 0 if all(figure.met for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
