"""What it costs to have 50 versions answer instead of one: the same number of requests, in the same batch.

A replica with the demo's base and adapters of rank 16 on all seven projections. Either all requests are of one
adapter, or each question is asked of every adapter, in one of three orders: in turns, as `loramux arena` asks;
question by question; version by version. Every prompt is new, so that only prefixes of the chat template are
met again; answers have 32 tokens unless they end before. Rounds are interleaved after one that warms up;
ratios are medians over rounds: of seconds per token of the whole run, of the median answer's time per token,
and of the time of processors per token, which other work on the machine changes least. The exit status is 1
where the first of them is above its bar in turns.

    python -m benchmarks.arena
    python -m benchmarks.arena --adapters 8 --questions 32 --rounds 2 --orders "in turns"
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from benchmarks.moving.figures import Figure, percentile, ratio
from benchmarks.moving.forge import Forge
from benchmarks.moving.server import Server, server
from loramux import AsyncClient
from loramux.arena.contest import Contest, met_by
from loramux.arena.kept import Kept
from loramux.arena.plan import Ask, Order, Plan, in_turns
from loramux.arena.questions import Question
from loramux.bench.workload import words

BAR: Final = 1.1
WORDS: Final = 32
TOKENS: Final = 32
WARM_UP: Final = 2
"""Questions of the first round."""
ONE: Final = "one adapter"


def by_question(plan: Plan, questions: Sequence[Question], samples: int) -> Iterator[Ask]:
    """All versions of a question before the next question."""
    for question in questions:
        for model in plan.models:
            for sample in range(samples):
                yield Ask(model, question, sample)


def by_version(plan: Plan, questions: Sequence[Question], samples: int) -> Iterator[Ask]:
    """All questions of a version before the next version."""
    for model in plan.models:
        for question in questions:
            for sample in range(samples):
                yield Ask(model, question, sample)


ORDERS: Final[Mapping[str, Order]] = {
    "in turns": in_turns,
    "question by question": by_question,
    "version by version": by_version,
}


@dataclass(frozen=True)
class Point:
    """One run."""

    per_token_s: float
    """Seconds of the whole run per token."""
    median_s: float
    """Of the answers' own times per token."""
    cpu_s: float
    """Of processors that the server had per token: what a machine that does much else tells all the same."""
    cached: float
    """Part of the prompts' tokens that were not computed."""


def questions(count: int, seed: int) -> list[Question]:
    """Return questions of words that were never asked."""
    draw = random.Random(seed)
    texts = [words(draw, WORDS) for _ in range(count)]
    return [Question(str(number), [{"role": "user", "content": text}]) for number, text in enumerate(texts)]


async def run(
    client: AsyncClient, running: Server, plan: Plan, asked: Sequence[Question], order: Order, file: Path
) -> Point:
    """Hold a contest whose answers nobody has yet."""
    with Kept(file) as kept:
        contest = Contest(client, plan, asked, kept, order=order)
        # With another prompt than `meet` takes: one of these would be in the cache, of every version.
        contest.found.entrants |= {model: await met_by(client, model, "Hello") for model in plan.models}
        cpu_s = running.cpu_s
        await contest.answer()
        cpu_s = running.cpu_s - cpu_s
    found = contest.found
    if found.failures:
        raise RuntimeError(str(found.failures[0]))
    answers = list(found.answers.values())
    times = [answer.per_token_s for answer in answers if answer.per_token_s is not None]
    cached = sum(answer.cached_tokens for answer in answers) / sum(answer.prompt_tokens for answer in answers)
    tokens = found.new_tokens
    return Point(found.answering_s / tokens, percentile(times, 0.5), cpu_s / tokens, cached)


async def measure(
    running: Server, names: Sequence[str], options: argparse.Namespace, work: Path
) -> dict[str, list[Point]]:
    """Run everything in turn, round by round; the first round warms up and is left out."""
    points: dict[str, list[Point]] = {}
    many = Plan(tuple(names), names[0], max_tokens=TOKENS, concurrency=options.concurrency)
    one = replace(many, models=many.models[:1])
    runs: list[tuple[str, Plan, int, Order]] = [(ONE, one, len(names), in_turns)]
    runs += [(name, many, 1, ORDERS[name]) for name in options.orders]
    async with AsyncClient(inference=running.grpc) as client:
        for number in range(options.rounds + 1):
            each = options.questions if number else WARM_UP
            # Prefixes of the template that a run leaves are there for the next: each has its turn to be first.
            first = number % len(runs)
            for seed, (name, plan, times, order) in enumerate(runs[first:] + runs[:first]):
                asked = questions(each * times, len(runs) * number + seed)
                point = await run(client, running, plan, asked, order, work / f"{name}-{number}.jsonl")
                times_ms = f"{1e3 * point.per_token_s:.2f} ms, {1e3 * point.cpu_s:.2f} of processors"
                print(f"round {number}, {name}: a token {times_ms}", flush=True)
                if number:
                    points.setdefault(name, []).append(point)
    return points


def figures(points: Mapping[str, Sequence[Point]]) -> list[Figure]:
    """Return what was found, and its bar."""
    one, found = points[ONE], []
    for name, own in points.items():
        mean = 1e3 * statistics.median(point.per_token_s for point in own)
        median = 1e3 * statistics.median(point.median_s for point in own)
        cached = statistics.median(point.cached for point in own)
        note = f"answers {median:.1f} ms, {cached:.0%} of prompts cached"
        found.append(Figure(f"{name}: a token of the run", mean, "ms", note=note))
        if name != ONE:
            bar = BAR if name == "in turns" else None
            times = ratio([point.per_token_s for point in own], [point.per_token_s for point in one])
            found.append(Figure(f"{name}: times {ONE}", times, "x", bar))
            times = ratio([point.median_s for point in own], [point.median_s for point in one])
            found.append(Figure(f"{name}: times {ONE}, of the median answer", times, "x"))
            times = ratio([point.cpu_s for point in own], [point.cpu_s for point in one])
            found.append(Figure(f"{name}: times {ONE}, of processors", times, "x"))
    return found


def main() -> int:
    """Measure, and print; 1 when the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    options = parser.parse_args()
    os.environ.setdefault("LORAMUX_SPECULATIVE_TOKENS", "0")
    with tempfile.TemporaryDirectory(prefix="loramux-arena-") as folder:
        work = Path(folder)
        forge = Forge(work)
        names = forge.deploy("arena", options.adapters)
        with server(forge, "arena") as running:
            found = figures(asyncio.run(measure(running, names, options, work)))
    print(f"load average {os.getloadavg()[0]:.1f}", *found, sep="\n")
    return 0 if all(figure.met for figure in found) else 1


if __name__ == "__main__":
    sys.exit(main())
