"""Prompt lookup: how much faster one stream is, and several at once, with drafts than without.

Texts, with the demo's base and with an adapter: code that is to be repeated, whose answer stands in the prompt;
the same held to a grammar, as a chat with tools is; records in JSON of a schema, whose names the grammar leaves
no choice about; an essay; and random words that are gone on with at temperature 1, where hardly a draft holds.
Both sides are replicas in this process, and answer the same requests in turn; figures are medians of ratios of
neighbours.

    python -m benchmarks.speculation
    python -m benchmarks.speculation --tokens 4 8 16 --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Final

import structlog

from benchmarks.moving.forge import Forge
from benchmarks.moving.replica import Local, prompt, replica
from inference_service.chat.demands import Demand
from inference_service.chat.dialect import Dialect
from inference_service.chat.formats.lark import Asked
from inference_service.core.constraint import Constraint
from inference_service.serving.request import Delta, Request
from loramux_shared.parsers import ReasoningParser, ToolParser

NEW: Final = 128
KV_GB: Final = 0.3
FUNCTION: Final = """def {name}(items):
    result = 0
    for item in items:
        if item.price > 0 and item.count > 0:
            result = result + item.price * item.count
    return result

"""
CODE: Final = "".join(FUNCTION.format(name=name) for name in ("total", "total_of_orders", "sum_of_all"))


@dataclass(frozen=True)
class Text:
    """What is asked, and how it is answered."""

    name: str
    prompt: Callable[[Local], list[int]]
    temperature: float
    constraint: Callable[[Local], Constraint | None] = lambda _: None


def _code(local: Local) -> list[int]:
    tokens: list[int] = local.ready.service.text.encode(f"{CODE}\n# The same once more:\n{CODE[:60]}")
    return tokens


def _essay(local: Local) -> list[int]:
    tokens: list[int] = local.ready.service.text.encode(
        "The keepers of lighthouses, an essay. In antiquity, fires"
    )
    return tokens


def _tools(local: Local) -> Constraint | None:
    tools = [Asked(f"tool_{number}", {"type": "object"}) for number in range(8)]
    dialect = Dialect(ToolParser.HERMES, ReasoningParser.NONE)
    return Demand(dialect, local.ready.service.text).free(tools, [])("")


def _records(_: Local) -> Constraint:
    kinds = {"name": "string", "price": "number", "count": "integer", "in_stock": "boolean"}
    item = {
        "type": "object",
        "properties": {name: {"type": kind} for name, kind in kinds.items()},
        "required": list(kinds),
        "additionalProperties": False,
    }
    return Constraint("json_schema", json.dumps({"type": "array", "items": item, "minItems": 20}))


TEXTS: Final = (
    Text("code that stands in the prompt, greedy", _code, 0.0),
    Text("the same beside 8 tools", _code, 0.0, _tools),
    Text("records of a schema, greedy", _code, 0.0, _records),
    Text("an essay, drawn", _essay, 0.8),
    Text("random words, drawn", lambda _: prompt(120), 1.0),
)


async def _answer(local: Local, model: str, text: Text, tokens: list[int]) -> tuple[list[int], float]:
    """Return an answer, and the seconds from its first token to its last."""
    answer: list[int] = []
    first = 0.0
    request = Request.of(
        model,
        tokens,
        max_tokens=NEW,
        temperature=text.temperature,
        seed=1,
        ignore_eos=True,
        constraint=text.constraint(local),
    )
    async for event in local.ready.service.generate(request):
        if isinstance(event, Delta):
            first = first or time.perf_counter()
            answer += [token.id for token in event.tokens]
    return answer, time.perf_counter() - first


async def _together(local: Local, model: str, text: Text, prompts: list[list[int]]) -> tuple[object, float]:
    """Return answers that were given at once, and the mean of their seconds."""
    found = await asyncio.gather(*(_answer(local, model, text, each) for each in prompts))
    return [answer for answer, _ in found], statistics.fmean(seconds for _, seconds in found)


async def _compare(plain: Local, drafting: Local, model: str, text: Text, streams: int, rounds: int) -> str:
    """Let both sides answer in turn; return what was found."""
    ratios, same, before = [], 0, drafting.ready.engine.stats
    for _ in range(rounds):
        prompts = [text.prompt(plain) for _ in range(streams)]
        for each in (plain, drafting):
            await _together(each, model, text, prompts)  # so that prompts are cached
        slow, slow_s = await _together(plain, model, text, prompts)
        fast, fast_s = await _together(drafting, model, text, prompts)
        ratios.append(slow_s / fast_s)
        same += slow == fast
    after = drafting.ready.engine.stats
    drafted = after.tokens_drafted - before.tokens_drafted
    held = after.tokens_accepted - before.tokens_accepted
    return (
        f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})  same answers {same} of "
        f"{rounds}  {held} of {drafted} drafted tokens held, of {2 * rounds * streams * NEW}"
    )


async def measure(sizes: list[int], streams: list[int], rounds: int, folder: Path) -> None:
    """Measure, and print a line for each."""
    forge = Forge(folder)
    names = forge.deploy("speculation", 1)
    async with AsyncExitStack() as stack:
        plain = await stack.enter_async_context(
            replica(forge, "speculation", kv_memory_gb=KV_GB, speculative_tokens=0)
        )
        for size in sizes:
            drafting = await stack.enter_async_context(
                replica(forge, "speculation", kv_memory_gb=KV_GB, speculative_tokens=size)
            )
            for model, count, text in product((plain.ready.service.catalog.base_name, *names), streams, TEXTS):
                found = await _compare(plain, drafting, model, text, count, rounds)
                print(f"{size:>2} tokens, {count:>2} streams, {model:<7} {text.name:<40}{found}", flush=True)


def main() -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8], help="sizes of the largest drafts")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keep stores here between runs; else they are temporary")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with tempfile.TemporaryDirectory(prefix="loramux-speculation-") as folder:
        work = options.folder or Path(folder)
        asyncio.run(measure(options.tokens, options.streams, options.rounds, work))
    return 0


if __name__ == "__main__":
    sys.exit(main())
