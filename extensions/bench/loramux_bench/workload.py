"""The requests of a load: prompts, models in turn, and start times."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.client import AsyncClient
from loramux.records import GenerateOptions, Prompt
from loramux_shared.faults import RequestInvalid
from loramux_shared.untrusted_json import parse_json

_TEXT = """
    the river road north wind stone bread letter window garden music engine paper winter silver market answer
    bridge candle doctor evening field glass harbor island journey kitchen lantern mirror needle orange pocket
    question rabbit summer table uncle valley water yellow anchor basket copper desert eagle forest ginger
    hammer ivory jacket kettle ladder meadow nickel ocean pepper quarry ribbon shadow timber velvet willow
"""
WORDS = _TEXT.split()
PROBE_WORDS = 16
"""Few, so that a server of short sequences takes them."""


@dataclass(frozen=True)
class BenchRequest:
    """One request."""

    number: int
    model: str
    prompt: Prompt


@dataclass(frozen=True)
class Workload:
    """An endless sequence of requests: models take turns, prompts are drawn, or taken from a file in turn."""

    models: Sequence[str]
    seed: int
    words: int
    """Words of a drawn prompt; two of them never begin alike for long, so that no cache of prompts helps."""
    prompts: Sequence[Prompt] = ()
    """Prompts of a file; drawn ones when empty."""

    def asks(self) -> Iterator[BenchRequest]:
        """Return the requests, the same at every call."""
        draw = random.Random(self.seed)  # noqa: S311 - words, not keys
        number = 0
        while True:
            model = self.models[number % len(self.models)]
            prompt = self.prompts[number // len(self.models) % len(self.prompts)] if self.prompts else None
            yield BenchRequest(number, model, prompt or words(draw, self.words))
            number += 1


def words(draw: random.Random, count: int) -> str:
    """Return a text of so many ordinary words."""
    return " ".join(draw.choices(WORDS, k=count))


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Return the times, in seconds from the start, of a Poisson process of rate requests per second."""
    draw = random.Random(seed)  # noqa: S311 - times, not keys
    at = 0.0
    while True:
        at += draw.expovariate(rate)
        yield at


async def words_for(client: AsyncClient, model: str, tokens: int) -> int:
    """Return how many words make a prompt of about so many tokens, by the server's own tokenizer."""
    count = min(PROBE_WORDS, tokens)
    probe = words(random.Random(0), count)  # noqa: S311 - words, not keys
    options: GenerateOptions = {"max_tokens": 1}
    started = (await client.complete(model, probe, **options)).started
    return max(1, round(tokens * count / max(started.prompt_tokens, 1)))


def read_prompts(path: Path) -> list[Prompt]:
    """Read a prompt per line: text, or a JSON object with ``text`` or with ``messages``.

    Raises:
        RequestInvalid: the file cannot be read or holds none, or a line is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RequestInvalid(f"cannot read the prompts of {path}: {why}") from error
    found = [_prompt(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise RequestInvalid(f"{path} holds no prompt; expected one per line")
    return found


def _prompt(line: str, where: str) -> Prompt:
    if not line.startswith("{"):
        return line
    try:
        fields: dict[str, Any] = parse_json(line)
    except ValueError as error:
        raise RequestInvalid(f"{where}: begins with {{ but is not JSON: {error}") from error
    match fields:
        case {"messages": [*messages]} if all(_is_message(message) for message in messages) and messages:
            return messages
        case {"text": str(text)} if text:
            return text
    raise RequestInvalid(f'{where}: expected {{"text": ...}} or {{"messages": [{{"role", "content"}}, ...]}}')


def _is_message(message: Any) -> bool:
    match message:
        case {"role": str(), "content": str()}:
            return True
    return False
