"""``loramux bench``: arithmetic, the open and the closed loop, and output."""

import itertools
import json
import signal
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from loramux.client import AsyncClient
from loramux_bench.drive import LoadPlan, drive
from loramux_bench.figures import FailureCount, Outcome, report
from loramux_bench.plot import plot
from loramux_bench.workload import Workload, arrivals, read_prompts
from loramux_shared.faults import RequestInvalid
from tests.support.cases import cases
from tests.support.processes.commands import run, start_command
from tests.support.services.fake_grpc import Fakes
from tests.support.waiting import wait_until


def outcome(model: str = "a", begin: float = 0.0, tokens: int = 11, error: str = "") -> Outcome:
    """A request that waited 0.5 s, then took a second for ten more tokens."""
    first = None if error else begin + 0.5
    return Outcome(model, begin, first, begin + 1.5, begin + 1.5, tokens, 1, 7, 3, error)


def test_a_report_counts_what_failed_apart() -> None:
    """Tokens and times are of answered requests; failures are counted by reason."""
    failed = [replace(outcome("b", at, 0, "QUEUE_FULL"), message=f"at {at}") for at in (1.0, 2.0)]
    full = {"QUEUE_FULL": FailureCount(2, "at 1.0")}
    found = report([outcome("a"), outcome("a", 1.0), *failed], ["a", "b"])
    a, b = found.models
    assert (a.requests, a.tokens, a.tokens_per_s) == (2, 22, pytest.approx(22 / 3.5))
    assert (b.requests, b.errors, b.first_token_s.p50) == (0, full, None)
    assert (found.seconds, found.all.requests, found.all.errors) == (3.5, 2, full)


def test_arrivals_are_a_poisson_process() -> None:
    """The mean gap is 1/rate and its deviation too; a seed gives the same times again."""
    times = list(itertools.islice(arrivals(50.0, seed=1), 4000))
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.02, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.02, rel=0.1)
    assert times[:9] == list(itertools.islice(arrivals(50.0, seed=1), 9))
    assert times[:9] != list(itertools.islice(arrivals(50.0, seed=2), 9))


def test_prompts_of_a_file(tmp_path: Path) -> None:
    """A line is text, or JSON with text or messages; empty lines say nothing."""
    turns = [{"role": "user", "content": "hi"}]
    path = tmp_path / "prompts"
    path.write_text(f'plain words\n\n{{"text": "of JSON"}}\n{json.dumps({"messages": turns})}\n')
    assert read_prompts(path) == ["plain words", "of JSON", turns]


@pytest.mark.parametrize(("text", "expected"), cases(__file__, "PROMPTS"))
def test_bad_prompts_are_named(tmp_path: Path, text: str, expected: str) -> None:
    """A bad file of prompts is refused with the line."""
    path = tmp_path / "prompts"
    path.write_text(text)
    with pytest.raises(RequestInvalid) as caught:
        read_prompts(path)
    assert expected in caught.value.message
    with pytest.raises(RequestInvalid, match="cannot read"):
        read_prompts(tmp_path / "nowhere")


async def test_a_closed_loop_keeps_so_many_open(fakes: Fakes) -> None:
    """A closed loop keeps as many requests open as asked for, and never more."""
    async with AsyncClient(inference=fakes.inference_address) as client:
        made = await drive(client, Workload(["base", "lora1"], 0, 4), LoadPlan(concurrency=3, requests=12))
    assert most_open(made.outcomes) == 3
    assert len(made.outcomes) == 12
    assert all(
        each.tokens == 5 and each.prompt_tokens == 7 and each.cached_tokens == 3 for each in made.outcomes
    )
    assert made.load.cpu > 0


def most_open(outcomes: Sequence[Outcome]) -> int:
    """Return how many requests were open at once at most."""
    return max(sum(other.begin <= each.begin < other.end for other in outcomes) for each in outcomes)


async def test_an_open_loop_sends_when_it_is_time(fakes: Fakes) -> None:
    """Requests begin at the times of the process, whether earlier ones have ended or not."""
    plan = LoadPlan(rate=200.0, duration_s=0.2)
    due = list(itertools.takewhile(lambda at: at <= 0.2, arrivals(200.0, seed=3)))
    async with AsyncClient(inference=fakes.inference_address) as client:
        made = await drive(client, Workload(["base"], 3, 4), plan)
    assert sorted(each.begin for each in made.outcomes) == due
    assert most_open(made.outcomes) > 1


async def test_failures_are_outcomes(fakes: Fakes) -> None:
    """A refused request is counted under its reason and does not end the run."""
    async with AsyncClient(inference=fakes.inference_address) as client:
        made = await drive(client, Workload(["base", "nobody"], 0, 4), LoadPlan(concurrency=2, requests=4))
    assert sorted(each.error for each in made.outcomes) == ["", "", "MODEL_NOT_FOUND", "MODEL_NOT_FOUND"]


def test_ctrl_c_ends_a_bench_with_its_figures(fakes: Fakes, tmp_path: Path) -> None:
    """The figures until then are printed, and the exit code says that it was cut off."""
    before = len(fakes.inference.requests)
    with start_command(tmp_path, "bench", "--grpc", fakes.inference_address, "--duration", "3600") as command:
        wait_until(lambda: len(fakes.inference.requests) >= before + 40, "requests", lambda: command.errors)
        assert command.end(signal.SIGINT) == 130
        assert command.out.splitlines()[4].split()[0] == "all"


def bench(fakes: Fakes, *args: str) -> tuple[int, str, str]:
    """Run the command against the fakes; returns its exit code, stdout and stderr."""
    return run("bench", "--grpc", fakes.inference_address, *args)


def test_a_table_for_people(fakes: Fakes) -> None:
    """The table has a line per model and one for all; stderr has the load of the client itself."""
    code, text, errors = bench(fakes, "--requests", "9", "--max-tokens", "5")
    lines = text.splitlines()
    assert code == 0
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["base", "3"],
        ["lora1", "3"],
        ["lora2", "3"],
        ["all", "9"],
    ]
    assert "first token p50/90/99 ms" in lines[0]
    assert "requests/s; on average" in lines[5]
    assert "the client took" in errors
    assert fakes.inference.requests[-1].sampling.ignore_eos


def test_json_has_everything(fakes: Fakes) -> None:
    """The plan, the figures per model and together, and the client's own load."""
    code, text, _ = bench(fakes, "--requests", "4", "--model", "lora1", "--eos", "--json")
    document = json.loads(text)
    assert code == 0
    assert document["plan"]["requests"] == 4
    [model] = document["report"]["models"]
    assert (model["model"], model["requests"], model["tokens"]) == ("lora1", 4, 20)
    assert set(model["per_token_s"]) == {"p50", "p90", "p99"}
    assert set(document["client"]) == {"cpu", "lag_s"}
    assert not fakes.inference.requests[-1].sampling.ignore_eos


def test_drawn_prompts_are_as_long_as_asked(fakes: Fakes) -> None:
    """The server's own count of a few words decides how many words make a prompt."""
    assert bench(fakes, "--requests", "1", "--model", "base", "--warmup", "0", "--prompt-tokens", "14")[0] == 0
    assert len(fakes.inference.requests[-1].text.split()) == 28  # the fake counts 7 tokens in every prompt


def test_bad_wishes_are_refused_before_anything_is_sent(fakes: Fakes, tmp_path: Path) -> None:
    """Two loops at once, an unknown model and an impossible chart are refused."""
    before = len(fakes.inference.requests)
    assert bench(fakes, "--rate", "1", "--concurrency", "1")[0] == 2
    assert "Did you mean lora1?" in bench(fakes, "--model", "lora11")[2]
    assert "expected a .png" in bench(fakes, "--plot", str(tmp_path / "a.pdf"))[2]
    assert len(fakes.inference.requests) == before


@pytest.mark.parametrize("models", [2, 12])
def test_a_picture(tmp_path: Path, models: int) -> None:
    """A PNG is written with matplotlib, for a few models and for many."""
    pytest.importorskip("matplotlib")
    names = [f"m{number}" for number in range(models)]
    outcomes = [outcome(name, begin) for name in names for begin in (0.0, 0.3)]
    plot([*outcomes, outcome(names[0], error="QUEUE_FULL")], names, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
