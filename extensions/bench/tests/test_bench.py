"""``loramux bench``: its load, its figures against a server of known delays, and its output."""

import asyncio
import itertools
import json
import re
import signal
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from loramux_bench.command import read_run, run_plan
from loramux_bench.comparison import compare
from loramux_bench.drive import Driver, client_load
from loramux_bench.figures import report
from loramux_bench.page import html_page
from loramux_bench.records import Record, Run
from loramux_bench.server import CHAT, Server, add_event, split_url
from loramux_bench.text import cautions
from loramux_bench.workload import Plan, PromptFit, Workload, read_dataset
from loramux_shared.faults import ModelNotFound, RequestInvalid
from tests.fake_openai import FakeOpenAI, FakeTransport, VirtualLoop, socket_server
from tests.support.cases import cases
from tests.support.http_server import serve_http
from tests.support.processes.commands import run, start_command
from tests.support.waiting import wait_until

CLOSE = 0.02
"""Part by which a figure may differ from what the server did."""
PLAN = Plan("http://fake", ())


def measured(fake: FakeOpenAI, plan: Plan = PLAN, warmups: int = 0, **server: Any) -> Run:
    """Return a run against a fake in virtual time."""

    async def measure() -> Run:
        async with httpx.AsyncClient(base_url="http://fake", transport=FakeTransport(fake)) as http:
            return await run_plan(Server(http, server.get("endpoint", ""), True), plan, [], warmups)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(measure())


def models(plan: Plan, count: int) -> list[str]:
    return [each.model for each in itertools.islice(Workload(plan).requests(), count)]


def test_a_seed_repeats_a_load() -> None:
    """Models, prompts, lengths and arrivals are those of the seed; lengths of answers change no prompt."""
    plan = replace(
        PLAN, models=("a", "b", "c"), input_len="4-40", output_len="lognormal:50:0.5", request_rate=5.0
    )

    def load(plan: Plan) -> list[Any]:
        workload = Workload(plan)
        return list(itertools.islice(zip(workload.requests(), workload.arrivals(), strict=False), 50))

    assert load(plan) == load(plan)
    assert load(plan) != load(replace(plan, seed=1))
    prompts = [[each.prompt for each, _ in load(other)] for other in (plan, replace(plan, output_len="7"))]
    assert prompts[0] == prompts[1]


def test_popular_models_are_asked_more_and_churn_moves_them() -> None:
    """Zipf's law gives rank r a weight of 1/r^S; with churn, the next model is the first after N requests."""
    plan = replace(PLAN, models=("a", "b", "c", "d"))
    counts = Counter(models(replace(plan, lora_distribution="zipf:1"), 5000))
    shares = [counts[name] / 5000 for name in plan.models]
    assert shares == pytest.approx([1 / rank / (25 / 12) for rank in (1, 2, 3, 4)], abs=CLOSE)
    moved = models(replace(plan, lora_distribution="churn:3:1000"), 3000)
    popular = [Counter(moved[begin : begin + 1000]).most_common(1)[0][0] for begin in (0, 1000, 2000)]
    assert popular == ["a", "b", "c"]
    uniform = Counter(models(plan, 5000))
    assert all(uniform[name] / 5000 == pytest.approx(0.25, abs=CLOSE) for name in plan.models)


@pytest.mark.parametrize(("burstiness", "deviation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_arrivals_have_their_rate_and_burstiness(burstiness: float, deviation: float) -> None:
    """The mean gap is 1/rate; its deviation is that of a Poisson process at 1, more for bursts."""
    plan = replace(PLAN, models=("a",), request_rate=50.0, burstiness=burstiness)
    times = [0.0, *itertools.islice(Workload(plan).arrivals(), 8000)]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.02, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.02 * deviation, rel=0.1)


def test_lengths_are_drawn() -> None:
    """A range is uniform, and a lognormal length has its median."""
    plan = replace(PLAN, models=("a",), output_len="10-20")
    lengths = [each.max_tokens for each in itertools.islice(Workload(plan).requests(), 2000)]
    assert (min(lengths), max(lengths)) == (10, 20)
    plan = replace(plan, output_len="lognormal:100:0.5")
    lengths = [each.max_tokens for each in itertools.islice(Workload(plan).requests(), 2000)]
    assert statistics.median(lengths) == pytest.approx(100, rel=0.05)


def test_figures_are_those_of_the_server() -> None:
    """A closed loop against known delays: TTFT, TPOT, ITL, E2EL and rates within 2 %."""
    fake = FakeOpenAI(first_s=0.2, token_s=0.01)
    figures = report(measured(fake, replace(PLAN, num_prompts=80, output_len="51", max_concurrency=4)))
    everything = figures.all
    assert everything.completed == 80
    assert everything.ttft_ms.p50 == pytest.approx(200, rel=CLOSE)
    assert everything.tpot_ms.p99 == pytest.approx(10, rel=CLOSE)
    assert everything.itl_ms.mean == pytest.approx(10, rel=CLOSE)
    assert everything.e2el_ms.p90 == pytest.approx(700, rel=CLOSE)
    assert figures.seconds == pytest.approx(20 * 0.7, rel=CLOSE)
    assert everything.output_throughput == pytest.approx(4 * 51 / 0.7, rel=CLOSE)
    assert everything.request_throughput == pytest.approx(4 / 0.7, rel=CLOSE)
    assert everything.output_tokens == sum(each.output_tokens for each in figures.models) == 80 * 51
    assert figures.warnings == ()


def test_prompts_are_as_long_as_the_server_counts() -> None:
    """Two short prompts show how many tokens a word and the template around it have."""
    fake = FakeOpenAI()
    plan = replace(PLAN, num_prompts=20, input_len="105", output_len="1")
    assert report(measured(fake, plan)).all.input_tokens == 20 * 105
    assert report(measured(fake, plan, endpoint=CHAT)).all.input_tokens == 20 * 105
    assert PromptFit.from_counts(0, 0).words(12) == 12


@pytest.mark.parametrize("chat_only", [False, True])
def test_several_tokens_a_chunk(chat_only: bool) -> None:
    """TPOT is per token where usage counts them, ITL is between chunks, and a note says so."""
    fake = FakeOpenAI(first_s=0.1, token_s=0.01, per_chunk=4, chat_only=chat_only)
    figures = report(measured(fake, replace(PLAN, num_prompts=8, output_len="64")))
    assert figures.all.tpot_ms.p50 == pytest.approx(10, rel=CLOSE)
    assert figures.all.itl_ms.p50 == pytest.approx(40, rel=CLOSE)
    assert figures.all.ttft_ms.p50 == pytest.approx(100, rel=CLOSE)
    assert "4.0 tokens on average" in " ".join(figures.notes)


def test_without_usage_chunks_are_counted() -> None:
    """A server without usage has its chunks counted, and a note says so."""
    figures = report(measured(FakeOpenAI(has_usage=False), replace(PLAN, num_prompts=8, output_len="16")))
    assert figures.all.output_tokens == 8 * 16
    assert "8 answers had no usage" in " ".join(figures.notes)


def test_an_open_loop_sends_when_requests_are_due() -> None:
    """Requests begin at the times of the process, whether earlier ones have ended or not."""
    plan = replace(PLAN, request_rate=50.0, duration_s=2.0, output_len="4")
    made = measured(FakeOpenAI(first_s=1.0), plan)
    due = list(itertools.takewhile(lambda at: at < 2.0, Workload(replace(plan, models=("a",))).arrivals()))
    assert sorted(each.due_s for each in made.records) == due
    assert report(made).all.ttft_ms.p99 == pytest.approx(1000, rel=CLOSE)
    assert made.client
    assert made.client.late_starts == 0


def test_a_bound_of_open_requests_is_part_of_the_wait() -> None:
    """Requests that wait in the client for a slot of an open loop have waited."""
    plan = replace(PLAN, request_rate=100.0, num_prompts=20, max_concurrency=1, output_len="1")
    made = measured(FakeOpenAI(first_s=1.0), plan)
    ends = sorted(each.end_s for each in made.records)
    assert [after - before for before, after in itertools.pairwise(ends)] == pytest.approx([1.0] * 19)
    assert max(each.ttft_ms or 0 for each in made.records) == pytest.approx(20_000, rel=CLOSE)


def test_the_first_use_of_a_model_is_apart() -> None:
    """Warm-ups go to the base, so that the first request of an adapter finds it cold; they are not counted."""
    fake = FakeOpenAI(first_s=0.1, cold_s={"base": 5.0, "a": 2.0, "b": 3.0})
    made = measured(fake, replace(PLAN, num_prompts=60, output_len="1", max_concurrency=1), warmups=4)
    figures = report(made)
    firsts = {each.model: each.first_use_ttft_ms.p50 for each in figures.models}
    assert firsts == {"base": None, "a": pytest.approx(2100), "b": pytest.approx(3100)}
    assert figures.all.later_ttft_ms.p99 == pytest.approx(100)
    assert figures.all.ttft_ms.p50 == pytest.approx(100)
    assert figures.all.completed == 60
    assert len(fake.requests) == 66
    assert "not counted: 6 earlier requests to base" in figures.notes[0]


def test_an_unfair_server_shows() -> None:
    """Jain's index of the models' mean TTFT is 1 where all wait alike; the slowest model is named."""
    plan = replace(PLAN, num_prompts=90, output_len="1", max_concurrency=3)
    fair = report(measured(FakeOpenAI(first_s=0.1), plan)).fairness
    assert fair
    assert fair.jain_index == pytest.approx(1.0)
    unfair = report(measured(FakeOpenAI(first_s=0.1, slow_s={"b": 0.9}), plan)).fairness
    assert unfair
    assert unfair.jain_index == pytest.approx(1.2**2 / (3 * 1.02), rel=CLOSE)
    assert (unfair.slowest, unfair.slowest_ttft_ms) == ("b", pytest.approx(1000, rel=CLOSE))


def test_goodput_counts_what_kept_the_limits() -> None:
    """Only answers within both limits are good; a limit that none keeps leaves nothing."""
    plan = replace(PLAN, num_prompts=60, output_len="11", max_concurrency=3, ttft_limit_ms=500.0)
    everything = report(measured(FakeOpenAI(first_s=0.1, token_s=0.01, slow_s={"b": 0.9}), plan)).all
    share = sum(name != "b" for name in models(replace(plan, models=("base", "a", "b")), 60)) / 60
    assert everything.request_goodput == pytest.approx(share * everything.request_throughput)
    slow = report(measured(FakeOpenAI(token_s=0.01), replace(plan, tpot_limit_ms=9.0))).all
    assert slow.request_goodput == 0.0


STREAMS: dict[str, list[Any]] = {
    "cut": [{"choices": [{"text": "a"}]}],
    "error": [{"choices": [{"text": "a"}]}, {"error": {"message": "out of memory"}}, "[DONE]"],
    "bad": ["{no"],
    "list": [[1]],
}


def test_failures_are_counted_by_kind() -> None:
    """A failed request ends no run, and has no part in the times of the answered ones."""
    fake = FakeOpenAI(
        models=("base", "full", "html", *STREAMS),
        refused={
            "full": (429, {"error": {"message": "queue is full"}}),
            "html": (200, {"text": "not a stream"}),
        },
        streamed=STREAMS,
    )
    made = measured(fake, replace(PLAN, num_prompts=100, output_len="2"))
    messages = {
        "HTTP_429": "queue is full",
        "NO_STREAM": "expected text/event-stream, found application/json",
        "CUT_OFF": "the stream ended before the answer did",
        "STREAM_ERROR": "out of memory",
        "BAD_STREAM": "an event of the stream is no chunk of an answer",
    }
    counts = Counter(each.error for each in made.records if each.error)
    assert report(made).all.errors == counts
    assert report(made).failures == tuple(
        f"failed: {counts[kind]} times {kind}: {messages[kind]}" for kind in sorted(messages)
    )
    assert report(made).all.output_tokens == 2 * report(made).all.completed > 0


def test_a_server_that_dies_ends_the_run() -> None:
    """A run ends with what was measured when ten requests in a row lose the server, and a warning says so."""
    made = measured(FakeOpenAI(dies_after=40), replace(PLAN, duration_s=86_400.0, output_len="9"))
    figures = report(made)
    assert 30 <= figures.all.completed <= 38
    assert 10 <= sum(figures.all.errors.values()) <= 20
    assert "the server is gone" in figures.warnings[0]


def test_a_busy_client_is_the_limit() -> None:
    """CPU, a late event loop and late starts are each named; else nothing is."""
    assert client_load(0.5, 5.0, [Record(0, "a", 0.0)]).limits == ()
    assert "80% of a core" in client_load(0.8, 5.0, []).limits[0]
    assert "50 ms late" in client_load(0.1, 50.0, []).limits[0]
    assert (
        "50% of the requests began"
        in client_load(0.1, 5.0, [Record(0, "a", 0.0, 0.02), Record(1, "a", 0.0)]).limits[0]
    )


def test_work_on_the_event_loop_is_measured() -> None:
    """A client that works for 0.1 s at each answer has a late loop and late starts, and a full core."""
    plan = replace(PLAN, models=("a",), request_rate=20.0, num_prompts=60, output_len="2")
    made = Run(plan)

    async def measure() -> None:
        loop: Any = asyncio.get_running_loop()
        async with httpx.AsyncClient(base_url="http://fake", transport=FakeTransport(FakeOpenAI())) as http:
            driver = Driver(Server(http, "", True), Workload(plan), made, lambda _: loop.block(0.1))
            await driver.drive(cpu_time=loop.time)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(measure())
    assert made.client
    assert [limit.split()[0] for limit in made.client.limits][:2] == ["it", "its"]
    assert any("began more than 10 ms late" in limit for limit in made.client.limits)


@pytest.mark.parametrize(("event", "chunks", "ended"), cases(__file__, "EVENTS"))
def test_chunks_with_tokens_are_told_from_others(event: list[Any], chunks: int, ended: bool) -> None:
    """The opening of a chat and the end of a stream bring no token; a token may have no text."""
    record = Record(0, "a", 0.0)
    assert add_event(event[0], record, 1.0) == ended
    assert record.chunks == chunks


def test_urls() -> None:
    """A URL may end with /v1, as clients have it, or name the endpoint."""
    assert split_url("http://h:8000/v1/") == split_url("http://h:8000") == ("http://h:8000", "")
    assert split_url("https://h/gateway/v1/chat/completions") == ("https://h/gateway", CHAT)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    """A line is text, or JSON with prompt, text or messages; empty lines say nothing."""
    turns = [{"role": "user", "content": "hi"}]
    path = tmp_path / "prompts"
    lines = [
        "plain words",
        "",
        '{"text": "of JSON"}',
        '{"prompt": "p", "output_tokens": 9}',
        json.dumps({"messages": turns}),
    ]
    path.write_text("\r\n".join(lines))
    found = [(each.prompt, each.output_tokens) for each in read_dataset(path)]
    assert found == [("plain words", None), ("of JSON", None), ("p", 9), (turns, None)]


@pytest.mark.parametrize(("text", "expected"), cases(__file__, "PROMPTS"))
def test_bad_prompts_are_named(tmp_path: Path, text: str, expected: str) -> None:
    """A bad file of prompts is refused with the line."""
    path = tmp_path / "prompts"
    path.write_text(text)
    with pytest.raises(RequestInvalid) as caught:
        read_dataset(path)
    assert expected in caught.value.message
    with pytest.raises(RequestInvalid, match="cannot read"):
        read_dataset(tmp_path / "nowhere")


def jittered(seed: int, factor: float = 1.0) -> Run:
    """Return a run of answers whose times vary."""
    plan = replace(PLAN, num_prompts=200, output_len="20-60", seed=seed)
    return measured(FakeOpenAI(first_s=0.1 * factor, token_s=0.01 * factor), plan)


def test_runs_are_compared() -> None:
    """A server that is a fifth slower is worse in all metrics; the same one shows no difference.

    No bound is below -100 %.
    """
    slower = {each.metric: each for each in compare(jittered(1, 1.2), jittered(2))}
    assert {each.verdict for each in slower.values()} == {"worse"}
    assert slower["TPOT, ms"].change == pytest.approx(0.2, rel=CLOSE)
    assert slower["E2EL, ms"].low < 0.2 < slower["E2EL, ms"].high
    quick = compare(jittered(1, 0.01), jittered(2))
    assert min(each.low for each in quick) == -1
    same = {each.metric: each.verdict for each in compare(jittered(1), jittered(2))}
    assert same["E2EL, ms"] == same["output tokens/s"] == "no difference shown"
    short = measured(FakeOpenAI(), replace(PLAN, num_prompts=3))
    assert (
        "the baseline had another load: closed loop of 8; 3 models" in cautions(jittered(1), jittered(2), [])[1]
    )
    assert "20 answers or more" in cautions(jittered(1), short, compare(jittered(1), short))[0]
    assert compare(jittered(1), short) == []
    made = jittered(1)
    limited = replace(made, plan=replace(made.plan, tpot_limit_ms=10.1))
    assert compare(limited, jittered(2))[-1].metric == "goodput, requests/s"
    none_good = jittered(2, 1.2)
    assert "goodput is not compared" in cautions(limited, none_good, compare(limited, none_good))[0]


def test_the_page_stands_alone() -> None:
    """The report loads nothing, runs nothing, and shows names of models as text."""
    fake = FakeOpenAI(models=("base", "<script>alert(1)</script>"), first_s=0.1, token_s=0.01)
    made = measured(fake, replace(PLAN, num_prompts=80, ttft_limit_ms=100.0, url="http://<b>"))
    baseline = jittered(1)
    text = html_page(made, report(made), baseline, compare(made, baseline))
    assert not re.search(r"<(script|link|img|iframe)|url\(|@import|\ssrc=|\shref=", text)
    assert text.count("<svg") == 5
    assert "&lt;script&gt;alert(1)" in text
    assert "<b>" not in text.partition("<style>")[0]
    assert "http://&lt;b&gt;" in text
    assert "NaN" not in text
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+", "", text)


def test_a_page_of_a_run_without_answers() -> None:
    """A run in which all failed, or that ended at once, has a page too."""
    fake = FakeOpenAI(refused={"a": (500, {"error": "x"}), "b": (500, {"error": "x"})})
    made = measured(fake, replace(PLAN, models=("a", "b"), num_prompts=3))
    assert "HTTP_500" in html_page(made, report(made), None, [])
    empty = Run(replace(PLAN, models=("a",)))
    assert "<svg" in html_page(empty, report(empty), None, [])


@pytest.fixture
def fake() -> FakeOpenAI:
    """Return a server without delays."""
    return FakeOpenAI()


@pytest.fixture
def url(fake: FakeOpenAI) -> Iterator[str]:
    """Return the URL of the server behind a socket."""
    with serve_http(socket_server(fake)) as address:
        yield f"http://{address}"


def test_a_table_for_people(url: str) -> None:
    """The table has a line per model and one for all; then rates, fairness and what is not counted."""
    code, text, errors = run("bench", url, "--num-prompts", "40", "--output-len", "5", "--ttft-limit", "9e9")
    lines = text.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines[1:5]] == ["base", "a", "b", "all"]
    assert lines[4].split()[1] == "40"
    assert lines[0].split()[1:4] == ["done", "failed", "tok/s"]
    assert "on average 64 tokens in, 5 out" in text.replace("65 tokens in", "64 tokens in")
    assert "within the limits, 100% of answers" in text
    assert "Jain's index" in text
    assert "not counted: 6 earlier requests to base" in errors


def test_a_run_can_be_read_again(fake: FakeOpenAI, url: str, tmp_path: Path) -> None:
    """A file that --json wrote makes a report again, and is a baseline of another run."""
    fake.token_s = 0.001
    code, text, _ = run("bench", url, "--num-prompts", "30", "--output-len", "4", "--eos", "--json")
    document = json.loads(text)
    saved, page = tmp_path / "run.json", tmp_path / "report.html"
    saved.write_text(text)
    assert code == 0
    assert document["plan"]["num_prompts"] == 30
    assert set(document["report"]["all"]["ttft_ms"]) == {"mean", "p50", "p90", "p99"}
    assert len(read_run(saved).records) == len(document["records"]) == 30
    code, text, errors = run("bench", saved, saved, "--html", page)
    assert (code, text.count("no difference shown")) == (0, 4)
    assert "not between runs" in errors
    assert page.read_text().startswith("<!doctype html>")
    code, text, errors = run("bench", url, saved, "--num-prompts", "25", "--seed", "3", "--json")
    assert (code, len(json.loads(text)["comparison"])) == (0, 4)
    assert "is no run" in run("bench", url, page)[2]
    assert "cannot read" in run("bench", url, tmp_path / "nowhere")[2]


@pytest.mark.parametrize(("words", "expected"), cases(__file__, "REFUSED"))
def test_bad_wishes_are_refused_before_anything_is_sent(words: list[str], expected: str) -> None:
    """An impossible URL, load or report is refused with what was expected."""
    code, _, errors = run("bench", *words)
    assert (code, expected in " ".join(errors.split())) == (2, True), errors


def test_a_server_that_cannot_be_measured_is_named(
    fake: FakeOpenAI, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing key, an unknown model, a missing list and a server that is not there each have a name."""
    assert "Did you mean base?" in run("bench", url, "--model", "bases")[2]
    fake.key = "k"
    code, _, errors = run("bench", url)
    assert (code, "UNAUTHENTICATED" in errors, "no such key" in errors) == (4, True, True)
    monkeypatch.setenv("LORAMUX_API_KEY", "k")
    assert run("bench", url, "--num-prompts", "1")[0] == 0
    fake.key, fake.lists = "", False
    code, _, errors = run("bench", url)
    assert (code, "name them with --model" in errors) == (2, True)
    code, _, errors = run("bench", url, "--model", "nobody")
    assert (code, "no model nobody" in errors) == (1, True)
    assert run("bench", url, "--model", "a", "--num-prompts", "3")[0] == 0
    code, _, errors = run("bench", "http://127.0.0.1:1")
    assert (code, "SERVER_UNAVAILABLE" in errors) == (3, True)
    fake.lists, fake.models = True, ()
    with pytest.raises(ModelNotFound):
        measured(fake)


def test_a_dead_server_ends_a_command_with_its_figures(fake: FakeOpenAI, url: str) -> None:
    """The figures until then are printed, and the exit code says that the server is away."""
    fake.dies_after = 30
    code, text, errors = run("bench", url, "--duration", "3600", "--output-len", "3")
    assert code == 3
    assert "the server is gone" in " ".join(errors.split())
    assert text.splitlines()[4].split()[0] == "all"
    assert "CUT_OFF" in text


def test_ctrl_c_ends_a_bench_with_its_figures(fake: FakeOpenAI, url: str, tmp_path: Path) -> None:
    """The figures until then are printed, and the exit code says that it was cut off."""
    with start_command(tmp_path, "bench", url, "--duration", "3600", "--output-len", "2") as command:
        wait_until(lambda: len(fake.requests) >= 60, "requests", lambda: command.errors)
        command.process.send_signal(signal.SIGINT)  # a second one follows at once
        assert command.end(signal.SIGINT) == 130
        assert "Traceback" not in command.errors
        assert command.out.splitlines()[4].split()[0] == "all"
        assert "ended early: Ctrl-C" in command.errors


@pytest.mark.sweep
def test_figures_of_a_real_clock(fake: FakeOpenAI, url: str, tmp_path: Path) -> None:
    """Against a socket and sleeps, medians are those of the server; needs a core that is free."""
    fake.first_s, fake.token_s = 0.2, 0.05
    code, text, _ = run(
        "bench", url, "--num-prompts", "24", "--output-len", "21", "--max-concurrency", "4", "--json"
    )
    everything = json.loads(text)["report"]["all"]
    assert code == 0
    assert everything["ttft_ms"]["p50"] == pytest.approx(200, rel=2 * CLOSE)
    assert everything["tpot_ms"]["p50"] == pytest.approx(50, rel=CLOSE)
    assert everything["e2el_ms"]["p50"] == pytest.approx(1200, rel=CLOSE)
