"""``loramux arena``: versions that answer the same questions, and who is better."""

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Final

import typer

from loramux.cli import shell
from loramux.cli.documents import emit
from loramux.cli.exits import Exit, state_dir
from loramux.cli.serving import complete_model, no_such_model
from loramux.client import INFERENCE, AsyncClient
from loramux_arena.contest import Contest, Found
from loramux_arena.judge import Judge, ServedJudge
from loramux_arena.judge_url import UrlJudge
from loramux_arena.kept import AnswerFile
from loramux_arena.page import page
from loramux_arena.plan import Plan
from loramux_arena.questions import Question, read_questions, with_reference
from loramux_arena.scores import LIKELIHOOD, scorer
from loramux_arena.standings import Standings, standings
from loramux_arena.view import ArenaView, show_standings
from loramux_shared.bundle.names import names_of
from loramux_shared.faults import Fault, SettingsInvalid
from loramux_shared.wording import listed

MAX_TOKENS: Final = 256
CONCURRENCY: Final = 32
ALL: Final = "all"
RUNS: Final = 20
"""Files of answers that are kept unasked; the oldest ones go."""
_SCALED: Final = re.compile(r"\*\s*[-+.0-9]")
"""A star before a number is a scale, any other one a pattern."""

Models = Annotated[
    str | None,
    typer.Option(
        "--models",
        metavar="A,B",
        help="Models: base, adapters, a*0.7+b, NAME@DIGEST, ck-*.",
        autocompletion=complete_model,
    ),
]
Prompts = Annotated[
    Path, typer.Option("--prompts", metavar="FILE", help="Text or JSONL file; see extensions/arena.")
]
Baseline = Annotated[
    str, typer.Option("--baseline", metavar="NAME", help="Baseline; default: the first model.")
]
Scores = Annotated[
    list[str] | None,
    typer.Option("--score", metavar="NAME", help="Score: strip, casefold, numeric, json, ...; repeatable."),
]
JudgeModel = Annotated[
    str, typer.Option("--judge", metavar="MODEL", help="Model that judges answers, in both orders.")
]
JudgeUrl = Annotated[str, typer.Option("--judge-url", metavar="URL", help="Judge's URL: http://HOST:PORT/v1.")]
Samples = Annotated[int, typer.Option("--samples", metavar="N", min=1, max=128, help="Answers per prompt.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", metavar="N", min=0, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option("--temperature", metavar="T", min=0.0, max=100.0)]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, max=2**32, help="Seed of draws.")]
System = Annotated[str, typer.Option("--system", metavar="TEXT", help="System message of every prompt.")]
Concurrency = Annotated[int, typer.Option("--concurrency", metavar="N", min=1, help="Most open requests.")]
Output = Annotated[Path | None, typer.Option("--output", metavar="FILE", help="HTML file of the report.")]
Resume = Annotated[Path | None, typer.Option("--resume", metavar="FILE", help="File of answers, to resume.")]


@dataclass(frozen=True)
class Options:
    """The options of the command line, beside the plan."""

    address: str
    models: str
    baseline: str
    judge: str
    judge_url: str
    output: Path | None


@dataclass
class Ran:
    """A contest that ended, or was broken off."""

    plan: Plan
    found: Found
    judge: str = ""
    """Its name, once it was asked."""
    stopped: Fault | None = None
    """Why it is not whole."""
    interrupted: bool = False


@shell.command
def arena(
    prompts: Prompts,
    models: Models = None,
    grpc: shell.Grpc = INFERENCE,
    baseline: Baseline = "",
    score: Scores = None,
    judge: JudgeModel = "",
    judge_url: JudgeUrl = "",
    samples: Samples = 1,
    max_tokens: MaxTokens = MAX_TOKENS,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    system: System = "",
    concurrency: Concurrency = CONCURRENCY,
    output: Output = None,
    resume: Resume = None,
    as_json: shell.Json = False,
) -> None:
    """Have versions answer the same prompts, and compare them.

    Example: loramux arena --models base,a,b --prompts FILE
    """
    questions = read_questions(prompts, system)
    names, likelihood = _scores(score, questions)
    plan = Plan((), "", samples, max_tokens, temperature, seed, concurrency, names, likelihood)
    _check(plan, judge, judge_url, output)
    options = Options(grpc, models or ALL, baseline, judge, judge_url, output)
    with AnswerFile(resume or _new_file()) as file:
        ran = asyncio.run(_arena(options, plan, questions, file))
    _tell(ran, options, questions, file.path, as_json)


def _scores(requested: Sequence[str] | None, questions: Sequence[Question]) -> tuple[tuple[str, ...], bool]:
    """Return the names of scores, and whether likelihoods are among them."""
    words = [*dict.fromkeys(requested or ())]
    for word in words:
        if word != LIKELIHOOD:
            scorer(word)
    known = with_reference(questions)
    if words and not known:
        raise SettingsInvalid(f"--score {words[0]}: no prompt of the file has a reference to compare with")
    if requested is None and known:
        words = ["strip"]
    return tuple(word for word in words if word != LIKELIHOOD), LIKELIHOOD in words


def _check(plan: Plan, judge: str, judge_url: str, output: Path | None) -> None:
    """Look beforehand at what would be found out after all was answered."""
    if plan.samples > 1 and plan.temperature == 0:
        raise SettingsInvalid("--samples: at temperature 0, all answers are the same. Set --temperature")
    if judge_url and not judge:
        raise SettingsInvalid("--judge-url needs --judge MODEL, the model that it is asked for")
    if not plan.max_tokens and (plan.scores or judge or not plan.likelihood):
        raise SettingsInvalid("--max-tokens 0 answers nothing: it goes with --score likelihood alone")
    if output is not None and (output.is_dir() or not os.access(output.resolve().parent, os.W_OK)):
        raise SettingsInvalid(f"--output {output}: expected a file in a folder that can be written to")


def _new_file() -> Path:
    """Return a new file for answers; older ones are removed."""
    folder = state_dir() / "arena"
    folder.mkdir(mode=0o700, exist_ok=True)
    for old in sorted(folder.glob("*.jsonl"))[: -RUNS + 1]:
        old.unlink(missing_ok=True)
    return folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.jsonl"


async def _arena(options: Options, plan: Plan, questions: Sequence[Question], file: AnswerFile) -> Ran:
    async with AsyncClient(inference=options.address) as client:
        with shell.working(f"asking {options.address}"):
            plan = await _entered(client, options, plan)
        view = ArenaView()
        contest = Contest(client, plan, questions, file, view.update)
        ran = Ran(plan, contest.found)
        with shell.working(f"asking {len(plan.models)} versions for a token"):
            await contest.meet()
            judge = await _judge(client, options)
            if judge is not None:
                await contest.meet_judge(judge)
        try:
            await _run(contest, plan, questions, judge, view, ran)
        except asyncio.CancelledError:  # Ctrl-C; what was answered until then is shown
            ran.interrupted = True
        except Fault as fault:
            ran.stopped = fault
        return ran


async def _entered(client: AsyncClient, options: Options, plan: Plan) -> Plan:
    """Return the plan with its versions; nothing that generates no text is among them.

    Raises:
        SettingsInvalid, ModelNotFound: what `named` raises, of the baseline and a judge too.
    """
    found = await client.models()
    served, silent = [each.name for each in found], [each.name for each in found if not each.generates]
    models = named(options.models, served, silent)
    baseline = options.baseline or models[0]
    for flag, name in (("--baseline", baseline), ("--judge", "" if options.judge_url else options.judge)):
        _require_text(flag, name, silent)
    if left := [name for name in named(options.models, served) if name not in models]:
        shell.say(f"left out, as they generate no text: {listed(left)}")
    models = [baseline, *(model for model in models if model != baseline)] if baseline not in models else models
    return replace(plan, models=tuple(models), baseline=baseline)


def named(words: str, served: Sequence[str], silent: Collection[str] = ()) -> list[str]:
    """Return the versions of a list with commas, each once; ``all`` and patterns stand for what answers.

    Raises:
        ModelNotFound: a pattern that nothing matches.
        SettingsInvalid: there are none, or one is named that is silent: it generates no text.
    """
    found: list[str] = []
    for word in filter(None, (part.strip() for part in words.split(","))):
        if word == ALL and word not in served:
            found += [name for name in served if name not in silent]
        elif ("*" in word and not _SCALED.search(word)) or "?" in word:
            matching = [name for name in served if fnmatchcase(name, word)]
            if not matching:
                raise no_such_model(word, served)
            answering = [name for name in matching if name not in silent]
            for name in () if answering else matching:
                _require_text("--models", name, silent)
            found += answering
        else:
            _require_text("--models", word, silent)
            found.append(word)
    if not found:
        raise SettingsInvalid("--models: expected names with commas between them, or all")
    return list(dict.fromkeys(found))


def _require_text(flag: str, model: str, silent: Collection[str]) -> None:
    """Refuse what generates no text, by itself or as a part of a mixture."""
    if silenced := [name for name in {model: None, **dict.fromkeys(names_of(model))} if name in silent]:
        raise SettingsInvalid(
            f"{flag} {model}: expected models that generate text, found models trained for scores or vectors: "
            f"{listed(silenced)}. Leave it out"
        )


async def _judge(client: AsyncClient, options: Options) -> Judge | None:
    """Return the judge, if there is one."""
    if not options.judge:
        return None
    if options.judge_url:
        return UrlJudge(options.judge_url, options.judge)
    served = {each.name: each.digest for each in await client.models()}
    return ServedJudge(client, options.judge, served.get(options.judge, ""))


async def _run(
    contest: Contest, plan: Plan, questions: Sequence[Question], judge: Judge | None, view: ArenaView, ran: Ran
) -> None:
    rows = len(plan.models) * plan.samples

    async def stage(name: str, total: int, work: Awaitable[None]) -> None:
        with view.stage(name, total, contest.found):
            await work

    if plan.max_tokens:
        await stage("answers", len(questions) * rows, contest.answer())
    if plan.likelihood:
        await stage(
            "likelihoods", len(with_reference(questions)) * len(plan.models), contest.score_likelihoods()
        )
    if judge is not None:
        ran.judge = judge.name
        await stage("verdicts", 2 * len(questions) * (rows - plan.samples), contest.judge(judge))


def _tell(ran: Ran, options: Options, questions: Sequence[Question], file: Path, as_json: bool) -> None:
    with shell.working("comparing"):
        report = standings(ran.plan, questions, ran.found, ran.judge)
    if as_json:
        emit({"plan": ran.plan, "report": report, "answers": file})
    else:
        show_standings(report)
    if options.output is not None:
        text = page(ran.plan, questions, ran.found, report, datetime.now(UTC))
        try:
            options.output.write_text(text, encoding="utf-8")
        except OSError as error:  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(options.output)) from error
        if not as_json:
            shell.say(f"report: {options.output}", "dim")
    _end(ran, report, file)


def _end(ran: Ran, report: Standings, file: Path) -> None:
    """Say what is left to do, and end with the code that says so."""
    if file.exists():
        shell.say(f"answers are kept in {file}", "dim")
    if ran.interrupted or ran.stopped is not None or report.failures:
        shell.say(f"go on with the same command and --resume {file}: what is kept is not asked again")
    if ran.interrupted:
        raise typer.Exit(Exit.INTERRUPTED)
    if ran.stopped is not None:
        raise ran.stopped
    if report.failures:
        raise typer.Exit(Exit.FAILED)
