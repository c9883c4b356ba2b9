"""The requests of a load: models, prompts, lengths and start times, the same for the same seed."""

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, BaseModel, Field, ValidationError
from typing_extensions import TypedDict

from loramux.records import Prompt
from loramux_shared.faults import RequestInvalid, SettingsInvalid

_TEXT = """
    the river road north wind stone bread letter window garden music engine paper winter silver market answer
    bridge candle doctor evening field glass harbor island journey kitchen lantern mirror needle orange pocket
"""
WORDS = _TEXT.split()
CONCURRENCY = 8
"""Open requests of a closed loop that states no other number."""
MAX_TOKENS = 2**20
FEW_WORDS, MORE_WORDS = 4, 32
"""Words of the two prompts that show how many tokens a word has; few, for servers of short sequences."""


@dataclass(frozen=True)
class Plan:
    """The load of a benchmark, as its user stated it; a request that has begun is always waited for."""

    url: str
    models: tuple[str, ...]
    lora_distribution: str = "uniform"
    request_rate: float | None = None
    """Requests per second of an open loop; None: a closed loop."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of gaps: 1 is a Poisson process, less comes in bursts."""
    max_concurrency: int | None = None
    """Open requests: of a closed loop always so many, of an open loop at most."""
    num_prompts: int | None = None
    duration_s: float | None = None
    """No request begins later."""
    input_len: str = "64"
    output_len: str = "64"
    dataset_path: str | None = None
    ignore_eos: bool = True
    seed: int = 0
    ttft_limit_ms: float | None = None
    tpot_limit_ms: float | None = None


@dataclass(frozen=True)
class BenchRequest:
    """One request."""

    number: int
    model: str
    prompt: Prompt
    max_tokens: int


@dataclass(frozen=True)
class PromptFit:
    """The number of tokens of a prompt of words, by the server's own count."""

    tokens_per_word: float = 1.0
    tokens_around: float = 0.0
    """Tokens of a chat template."""

    @classmethod
    def from_counts(cls, tokens_of_few: int, tokens_of_more: int) -> "PromptFit":
        """Return the fit of `FEW_WORDS` and `MORE_WORDS`; a word is a token where nothing is known."""
        slope = (tokens_of_more - tokens_of_few) / (MORE_WORDS - FEW_WORDS)
        return cls(slope, tokens_of_few - slope * FEW_WORDS) if slope > 0 else cls()

    def words(self, tokens: int) -> int:
        """Return how many words make a prompt of about so many tokens."""
        return max(1, round((tokens - self.tokens_around) / self.tokens_per_word))


def read_lengths(text: str, option: str) -> Callable[[random.Random], int]:
    """Return a draw of lengths in tokens; raise SettingsInvalid where a text names no distribution."""
    if found := re.fullmatch(r"(\d{1,7})(?:-(\d{1,7}))?", text):
        low, high = int(found[1]), int(found[2] or found[1])
        if 1 <= low <= high <= MAX_TOKENS:
            return lambda draw: draw.randint(low, high)
    elif found := re.fullmatch(r"lognormal:([1-9]\d{0,5}):(\d(?:\.\d{1,9})?)", text):
        median, sigma = int(found[1]), float(found[2])
        return lambda draw: min(max(round(median * draw.lognormvariate(0.0, sigma)), 1), MAX_TOKENS)
    expected = f"N, LOW-HIGH or lognormal:MEDIAN:SIGMA, of 1 to {MAX_TOKENS} tokens"
    raise SettingsInvalid(f"{option}={text}: expected {expected}")


def read_popularity(text: str) -> tuple[float, int]:
    """Return S and N: rank r is drawn with a weight of 1/r^S, and after N requests each model moves up a rank.

    N is 0 where models keep their ranks. Raises SettingsInvalid for what is no distribution.
    """
    found = re.fullmatch(r"uniform|(zipf|churn):(\d(?:\.\d{1,9})?)(?::([1-9]\d{0,8}))?", text)
    if found and (found[1] == "churn") == bool(found[3]):
        return float(found[2] or 0), int(found[3] or 0)
    raise SettingsInvalid(f"--lora-distribution={text}: expected uniform, zipf:S or churn:S:N, as zipf:1")


class Turn(TypedDict):
    """A message of a prompt."""

    role: str
    content: str


class DatasetPrompt(BaseModel):
    """A prompt of a file, and the tokens of its answer where the line says so."""

    prompt: Annotated[
        str | list[Turn], Field(min_length=1, validation_alias=AliasChoices("prompt", "text", "messages"))
    ]
    output_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None


@dataclass(frozen=True)
class Workload:
    """An endless sequence of requests: prompts are drawn, or taken from a file in turn."""

    plan: Plan
    fit: PromptFit = PromptFit()
    dataset: Sequence[DatasetPrompt] = ()

    def requests(self) -> Iterator[BenchRequest]:
        """Yield the requests, the same at every call: models, words and lengths have a generator each."""
        plan = self.plan
        exponent, moves_after = read_popularity(plan.lora_distribution)
        inputs, outputs = read_lengths(plan.input_len, ""), read_lengths(plan.output_len, "")
        model_draw, texts, input_draw, output_draw = map(self._draw, ("models", "texts", "inputs", "outputs"))
        weights = list(itertools.accumulate((rank + 1) ** -exponent for rank in range(len(plan.models))))
        for number in itertools.count():
            rank = model_draw.choices(range(len(weights)), cum_weights=weights)[0]
            moved = number // moves_after if moves_after else 0
            model, max_tokens = plan.models[(rank + moved) % len(weights)], outputs(output_draw)
            if self.dataset:
                line = self.dataset[number % len(self.dataset)]
                yield BenchRequest(number, model, line.prompt, line.output_tokens or max_tokens)
            else:  # no two begin alike for long, so no cache of prompts helps
                words = texts.choices(WORDS, k=self.fit.words(inputs(input_draw)))
                yield BenchRequest(number, model, " ".join(words), max_tokens)

    def arrivals(self) -> Iterator[float]:
        """Yield the times, in seconds from the start, at which requests of an open loop are due."""
        draw, shape = self._draw("arrivals"), self.plan.burstiness
        at = 0.0
        while True:
            at += draw.gammavariate(shape, 1 / (shape * (self.plan.request_rate or 1.0)))
            yield at

    def _draw(self, use: str) -> random.Random:
        return random.Random(f"{use} {self.plan.seed}")  # noqa: S311 - a load, not keys


def read_dataset(path: Path) -> list[DatasetPrompt]:
    """Read a prompt per line: text, or JSON with ``prompt`` or ``messages``, and maybe ``output_tokens``.

    Raises:
        RequestInvalid: the file cannot be read or holds none, or a line is none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RequestInvalid(f"cannot read the prompts of {path}: {why}") from error
    found = [_dataset_prompt(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line]
    if not found:
        raise RequestInvalid(f"{path} holds no prompt; expected one per line")
    return found


def _dataset_prompt(line: str, where: str) -> DatasetPrompt:
    try:
        return DatasetPrompt.model_validate_json(line) if line[0] == "{" else DatasetPrompt(prompt=line)
    except ValidationError as error:
        expected = '{"prompt": ...} or {"messages": [{"role", "content"}, ...]}, and maybe "output_tokens": N'
        raise RequestInvalid(f"{where}: expected text, {expected}") from error
