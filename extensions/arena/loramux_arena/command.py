"""``loramux arena``: versions compared on a file of examples."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer

from loramux.cli import shell
from loramux.cli.documents import emit
from loramux.cli.exits import Exit
from loramux.cli.serving import complete_model
from loramux.client import INFERENCE, AsyncClient
from loramux_arena.comparison import MIN_EXAMPLES, Comparison
from loramux_arena.examples import Example, read_examples
from loramux_arena.scoring import Plan, Score, Scores, meet, score_all
from loramux_shared.faults import SettingsInvalid

MAX_FAILURES_SHOWN: Final = 10

Models = Annotated[
    str,
    typer.Option(
        "--models",
        metavar="A,B",
        help="Versions, baseline first: base, NAME, NAME@DIGEST, a*0.7+b.",
        autocompletion=complete_model,
    ),
]
Examples = Annotated[
    Path, typer.Option("--examples", metavar="FILE", help="JSONL file; see extensions/arena/README.md.")
]
ScoreName = Annotated[
    Score, typer.Option("--score", metavar="NAME", help="Score: likelihood of the reference, or exact.")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", metavar="N", min=1, help="Most tokens of an answer.")]
Concurrency = Annotated[int, typer.Option("--concurrency", metavar="N", min=1, help="Most open requests.")]


@shell.command
def arena(
    examples: Examples,
    models: Models,
    grpc: shell.Grpc = INFERENCE,
    score: ScoreName = Score.LIKELIHOOD,
    max_tokens: MaxTokens = 256,
    concurrency: Concurrency = 32,
    as_json: shell.Json = False,
) -> None:
    """Compare versions on examples with known answers.

    Example: loramux arena --models base,support --examples FILE
    """
    plan = Plan(_named(models), score, max_tokens, concurrency)
    scores = asyncio.run(_run(grpc, plan, read_examples(examples)))
    compared = scores.comparisons()
    if as_json:
        emit(_document(plan, scores, compared))
    else:
        _show(plan, scores, compared)
    if scores.failures:
        raise typer.Exit(Exit.FAILED)


def _named(words: str) -> list[str]:
    """Return the versions of a list with commas.

    Raises:
        SettingsInvalid: they are fewer than two, or one is named twice.
    """
    found = [word.strip() for word in words.split(",") if word.strip()]
    if len(found) < 2 or len(set(found)) < len(found):
        raise SettingsInvalid(
            f"--models {words}: expected two names or more with commas between them, each once"
        )
    return found


async def _run(address: str, plan: Plan, examples: Sequence[Example]) -> Scores:
    async with AsyncClient(inference=address) as client:
        with shell.working(f"asking {len(plan.models)} versions for a token"):
            await meet(client, plan.models, min(examples, key=lambda example: len(str(example.prompt))))
        with shell.working(f"scoring {len(examples)} examples with {len(plan.models)} versions"):
            return await score_all(client, plan, examples)


def _document(plan: Plan, scores: Scores, compared: Sequence[Comparison]) -> dict[str, object]:
    return {
        "score": plan.score,
        "baseline": plan.models[0],
        "comparisons": [asdict(each) | {"verdict": each.verdict} for each in compared],
        "scores": scores.by_model,
        "failures": [
            {
                "model": each.model,
                "example": each.example,
                "reason": each.fault.reason,
                "message": str(each.fault),
            }
            for each in scores.failures
        ],
    }


def _show(plan: Plan, scores: Scores, compared: Sequence[Comparison]) -> None:
    shell.show(f"{plan.score}, against {plan.models[0]}", "bold")
    headers = ("version", "examples", "mean", "baseline", "difference", "95 %", "verdict")
    shell.table(headers, [_row(each) for each in compared], frozenset(headers[1:6]))
    for failure in scores.failures[:MAX_FAILURES_SHOWN]:
        fault = failure.fault
        shell.show(f"failed: {failure.model}, {failure.example}: {fault.reason}: {fault}", "red")
    if len(scores.failures) > MAX_FAILURES_SHOWN:
        shell.show(f"failed: {len(scores.failures) - MAX_FAILURES_SHOWN} more", "red")
    if compared and min(each.examples for each in compared) < MIN_EXAMPLES:
        shell.say(f"note: with fewer than {MIN_EXAMPLES} examples, intervals are narrower than they say", "dim")


def _row(each: Comparison) -> tuple[str, ...]:
    return (
        each.model,
        str(each.examples),
        f"{each.mean:.3f}",
        f"{each.baseline_mean:.3f}",
        f"{each.difference:+.3f}",
        f"{each.interval.low:+.3f} to {each.interval.high:+.3f}",
        each.verdict,
    )
