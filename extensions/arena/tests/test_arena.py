"""Versions compared on examples: the file, the scores, the intervals, and the command."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loramux.cli.main import app
from loramux.records import PromptToken, TokenLogprobs
from loramux_arena.comparison import bootstrap, compare
from loramux_arena.examples import Example, by_version, read_examples
from loramux_arena.scoring import likelihood_of
from loramux_shared.faults import RequestInvalid
from tests.arena_server import Versions, serving
from tests.support.waiting import in_thread


def lines(path: Path, *rows: object) -> Path:
    """Write lines: text unchanged, anything else as JSON."""
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_a_line_is_an_example(tmp_path: Path) -> None:
    """A prompt is a user's turn, and messages are all turns; a line without an id has its number."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    one, two, three = read_examples(
        lines(
            tmp_path / "examples",
            {"prompt": "2+2?", "reference": 4, "id": "sum"},
            "",
            {"messages": turns, "reference": "Bye"},
            {"text": "Once", "reference": " upon"},
        )
    )
    assert one == Example("sum", [{"role": "user", "content": "2+2?"}], "4")
    assert two == Example("3", turns, "Bye")
    assert three == Example("4", "Once", " upon")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{", 'E_BAD_FIELD line 2: expected {"prompt": TEXT'),
        ("Hello", 'E_BAD_FIELD line 2: expected {"prompt": TEXT'),
        ({"prompt": "x", "reference": "y", "answer": "z"}, "E_UNKNOWN_FIELD line 2: expected only prompt"),
        ({"reference": "y"}, "E_MISSING_FIELD line 2: expected one of prompt, messages, text, found none"),
        ({"prompt": "x", "text": "y", "reference": "z"}, "found prompt and text"),
        ({"prompt": "x"}, "E_MISSING_FIELD line 2, reference: expected the right answer, found none"),
        ({"prompt": " ", "reference": "y"}, "line 2, prompt: expected text"),
        ({"messages": ["x"], "reference": "y"}, "line 2, messages: expected a list of turns"),
        ({"messages": [{"content": "x"}], "reference": "y"}, "line 2, messages: expected {"),
        ({"prompt": "x", "reference": "y", "id": [1]}, "line 2, id: expected text"),
        ({"prompt": "x", "reference": "y", "id": 1}, "line 2, id: expected another id"),
    ],
)
def test_a_line_that_is_no_example_is_named(line: object, found: str, tmp_path: Path) -> None:
    """A bad line has a finding with its number, and a good line beside has none."""
    with pytest.raises(RequestInvalid) as caught:
        read_examples(lines(tmp_path / "examples", {"prompt": "x", "reference": "y"}, line))
    [finding] = caught.value.findings
    assert found in str(finding)


def test_files_without_examples(tmp_path: Path) -> None:
    """A missing file, a binary file and an empty file have separate messages."""
    (tmp_path / "binary").write_bytes(b"\xff")
    (tmp_path / "empty").write_text("\n")
    for name, reported in (("none", "No such file"), ("binary", "not UTF-8"), ("empty", "has no examples")):
        with pytest.raises(RequestInvalid, match=reported):
            read_examples(tmp_path / name)


def test_requests_take_turns_by_version() -> None:
    """As many examples as are open at once are asked of one version before the next one."""
    examples = [Example(str(number), "x", "y") for number in range(3)]
    found = [f"{model}{example.id}" for model, example in by_version(("a", "b"), examples, 2)]
    assert found == ["a0", "a1", "b0", "b1", "a2", "b2"]


def token(text: str, logprob: float | None) -> PromptToken:
    return PromptToken(1, None if logprob is None else TokenLogprobs(logprob, (), text.encode()))


def test_tokens_of_a_reference_are_the_last_ones() -> None:
    """A reference is the last tokens of a prompt, with tokens that it shares and without stripped spaces."""
    prompt = [token("<s>", None), token("2+2", -9.0), token("=", -8.0), token(" fo", -0.5), token("ur", -0.25)]
    assert likelihood_of(" four", prompt) == likelihood_of("four ", prompt) == -0.375
    assert likelihood_of("= four", prompt) == pytest.approx(-8.75 / 3)
    for reference in ("five", "", " ", "x" * 50):
        with pytest.raises(RequestInvalid, match="cannot be scored"):
            likelihood_of(reference, prompt)


def test_an_interval_is_as_wide_as_theory_says() -> None:
    """Interval ends over many examples lie 1.96 standard errors from the mean; a seed repeats them."""
    differences = [((7 * number) % 101) / 100 for number in range(404)]
    found = bootstrap(differences, seed=3)
    mean, error = statistics.fmean(differences), statistics.pstdev(differences) / 404**0.5
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    assert bootstrap(differences, seed=3) == found != bootstrap(differences, seed=4)


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [([2.0, 2.1, 2.2], "better"), ([0.0, 0.1, -0.2], "worse"), ([0.5, 1.0, 1.5], "no difference shown")],
)
def test_a_difference_is_shown_where_the_interval_has_no_0(scores: list[float], verdict: str) -> None:
    """Examples without a score of both versions are left out."""
    found = compare("a", dict(zip("xyz", scores, strict=True)) | {"more": 9}, dict.fromkeys("xyz", 1.0))
    assert found is not None
    assert (found.examples, found.verdict) == (3, verdict)
    assert compare("a", {"x": 1}, {"y": 1}) is None


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Versions, str]]:
    """A server in a thread of its own, and its address: a is right, b is as good as the base."""
    service = Versions(
        lambda model, query: f" {query}!\n" if model == "a" else "?", {"base": -2.0, "a": -1.0, "b": -2.0}
    )
    with in_thread(serving(service)) as address:
        yield service, address


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    rows = [{"id": f"q{number}", "prompt": f"p{number}", "reference": f"p{number}!"} for number in range(3)]
    return lines(tmp_path / "examples.jsonl", *rows)


def arena(served: tuple[Versions, str], examples: Path, *words: str) -> tuple[int, str, str]:
    """Run the command; returns its exit status, stdout and stderr."""
    served[0].heard.clear()
    result = CliRunner().invoke(app, ["arena", "--grpc", served[1], "--examples", str(examples), *words])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(("score", "means"), [("likelihood", (-1.0, -2.0)), ("exact", (1.0, 0.0))])
def test_versions_are_compared_with_the_first_one(
    served: tuple[Versions, str], examples: Path, score: str, means: tuple[float, float]
) -> None:
    """The JSON document has means, differences, intervals and verdicts; the table has the same for people."""
    words = "--models", "base,a,b", "--score", score
    code, text, _ = arena(served, examples, *words, "--json")
    document = json.loads(text)
    better, same = document["comparisons"]
    assert (code, document["baseline"], document["failures"]) == (0, "base", [])
    assert (better["mean"], better["baseline_mean"], better["verdict"]) == (*means, "better")
    assert better["interval"] == {"low": 1.0, "high": 1.0}
    assert (same["difference"], same["verdict"]) == (0, "no difference shown")
    code, text, errors = arena(served, examples, *words)
    assert code == 0
    assert text.splitlines()[2].split()[:2] == ["a", "3"]
    assert text.splitlines()[3].endswith("no difference shown")
    assert "fewer than 20 examples" in errors


def test_a_request_that_fails_is_named(served: tuple[Versions, str], examples: Path) -> None:
    """Versions are compared without the example whose request was refused, and the command exits with 1."""
    served[0].refusals = iter([None, None, RequestInvalid("the prompt is odd.")])
    code, text, _ = arena(served, examples, "--models", "base,a", "--concurrency", "1")
    assert code == 1
    assert "failed: base, q0: REQUEST_INVALID: the prompt is odd." in text
    assert text.splitlines()[2].split()[:2] == ["a", "2"]


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (("--models", "base,nobody"), 1, "MODEL_NOT_FOUND: nobody: no model 'nobody'"),
        (("--models", "base"), 2, "expected two names or more"),
        (("--models", "base,base"), 2, "each once"),
        (("--models", "base,a", "--score", "fuzzy"), 2, "'fuzzy' is not one of"),
    ],
)
def test_what_cannot_be_done_is_reported_before_anything(
    words: tuple[str, ...], code: int, expected: str, served: tuple[Versions, str], examples: Path
) -> None:
    """Wrong flags and names that are not served end the command before an example is scored."""
    found, _, errors = arena(served, examples, *words)
    assert (found, expected in errors) == (code, True), errors
    assert all(each.sampling.max_tokens == 1 for each in served[0].heard)
