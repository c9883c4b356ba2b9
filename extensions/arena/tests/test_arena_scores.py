"""Scores of answers and their differences: by closed forms, by enumeration, by examples."""

import itertools
import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Any

import pytest

from loramux.records import Message, PromptToken, TokenLogprobs
from loramux_arena.judge_url import API_KEY, UrlJudge
from loramux_arena.likelihood import of_reference
from loramux_arena.paired import bootstrap, holm, sign_test
from loramux_arena.scores import SCORERS, scorer
from loramux_shared import faults
from tests.support.cases import cases
from tests.support.https_server import Answering, served


@pytest.mark.parametrize(
    ("name", "answer", "reference", "agrees"), cases(__file__, "test_agreement_has_a_name")
)
def test_agreement_has_a_name(name: str, answer: str, reference: str, agrees: bool) -> None:
    """Each score ignores the differences in its name, and no others."""
    assert scorer(name)(answer, reference) is agrees


@pytest.mark.parametrize("word", ["fuzzy", "regex=", "regex=("])
def test_scores_that_there_are_not(word: str) -> None:
    """An unknown score and an invalid pattern are refused, with the known scores."""
    with pytest.raises(faults.SettingsInvalid, match=r"--score"):
        scorer(word)
    assert all(scorer(name) is SCORERS[name] for name in SCORERS)


def test_the_sign_test_is_exact() -> None:
    """The p-value is the share of all coin tosses that are as uneven as the result."""
    for count in range(1, 11):
        heads = [sum(tosses) for tosses in itertools.product((0, 1), repeat=count)]
        for wins in range(count + 1):
            uneven = sum(abs(2 * each - count) >= abs(2 * wins - count) for each in heads)
            assert sign_test(wins, count - wins) == pytest.approx(uneven / 2**count)
    assert sign_test(0, 0) == 1.0
    assert 0 < sign_test(900, 1100) < 1e-5
    assert sign_test(0, 5000) == 0.0


def test_holm_is_step_down() -> None:
    """The least p-value counts for all, the next one for one fewer, and none is below one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_an_interval_is_as_wide_as_theory_says() -> None:
    """Interval ends over many questions lie 1.96 standard errors from the mean; a seed repeats them."""
    differences = [((7 * number) % 101) / 100 for number in range(404)]
    found = bootstrap(differences, seed=3)
    mean, error = statistics.fmean(differences), statistics.pstdev(differences) / 404**0.5
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    assert bootstrap(differences, seed=3) == found != bootstrap(differences, seed=4)
    assert (bootstrap([0.5, 0.5], 0).low, bootstrap([0.5, 0.5], 0).high) == (0.5, 0.5)


def token(text: str, logprob: float | None) -> PromptToken:
    return PromptToken(1, None if logprob is None else TokenLogprobs(logprob, (), text.encode()))


def test_tokens_of_a_reference_are_the_last_ones() -> None:
    """A reference is the last tokens of a prompt, with tokens that it shares and without stripped spaces."""
    prompt = [token("<s>", None), token("2+2", -9.0), token("=", -8.0), token(" fo", -0.5), token("ur", -0.25)]
    assert of_reference(prompt, " four") == (-0.75, 2)
    assert of_reference(prompt, "four ") == (-0.75, 2)
    assert of_reference(prompt, "= four") == (-8.75, 3)
    for reference in ("five", "", " ", "x" * 50):
        with pytest.raises(faults.RequestInvalid, match="cannot be scored"):
            of_reference(prompt, reference)


QUESTION_TURNS: list[Message] = [{"role": "user", "content": "A or B?"}]


@contextmanager
def http(status: int, text: object, headers: dict[str, str] | None = None) -> Iterator[tuple[str, list[Any]]]:
    """Answer every request alike; yields the address and the received requests."""
    received: list[Any] = []

    class Handler(Answering):
        def do_POST(self) -> None:  # noqa: N802 - the base class's name
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            received.append((self.path, self.headers.get("authorization"), body))
            content = {"choices": [{"message": {"content": text}}]}
            self.answer(status, json.dumps(content).encode(), **(headers or {}))

    with served(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as address:
        yield f"http://{address}/v1", received


async def test_a_judge_behind_an_address() -> None:
    """The judge is called with a schema that allows a letter only, and with its own key."""
    with http(200, '{"verdict": "B"}') as (url, received):
        assert await UrlJudge(f"{url}/", "judge", "secret").letter(QUESTION_TURNS) == "B"
    [(path, key, body)] = received
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["messages"]) == ("judge", QUESTION_TURNS)
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["verdict"]["enum"] == ["A", "B", "C"]


@pytest.mark.parametrize(
    ("status", "expected", "headers", "reason"), cases(__file__, "test_judges_that_do_not_judge")
)
async def test_judges_that_do_not_judge(
    status: int, expected: object, headers: dict[str, str], reason: str
) -> None:
    """Each failure has a class, which says whether to ask again; a redirect is not followed."""
    with http(status, expected, headers) as (url, received), pytest.raises(faults.Fault) as caught:
        await UrlJudge(url, "judge", "").letter(QUESTION_TURNS)
    assert (len(received), caught.value.reason) == (1, reason)
    if status == 429:
        assert caught.value.retry_after_s == 7.0
    assert (status == 401) == (API_KEY in caught.value.message)


async def test_addresses_that_are_none() -> None:
    """Other schemes and a key in the address are refused; a missing address is reported as such."""
    for url in ("file:///etc/passwd", "127.0.0.1:80", "http://key@host/v1"):
        with pytest.raises(faults.SettingsInvalid, match="--judge-url"):
            UrlJudge(url, "judge", "")
    with pytest.raises(faults.ServerUnavailable, match=r"no answer from the judge at 127\.0\.0\.1:1"):
        await UrlJudge("http://127.0.0.1:1/v1", "judge", "").letter(QUESTION_TURNS)
