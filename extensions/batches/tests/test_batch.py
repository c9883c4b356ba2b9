"""Batches in OpenAI's format: each request once, whatever interrupts a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from loramux.cli.main import app
from loramux_batches.batch import ATTEMPTS, Batch, Counts
from loramux_shared.faults import RequestInvalid
from tests.support.cases import cases
from tests.support.openai_api import openai_world

CHAT = "/v1/chat/completions"


def request(number: int, **fields: Any) -> dict[str, Any]:
    return {"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": {"n": number}} | fields


def written(path: Path, *lines: Any) -> Path:
    """Return a file of JSON lines; text is written unchanged."""
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def answers(path: Path) -> dict[str, Any]:
    """The responses of an output, each of which stands there once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["custom_id"]: line["response"] for line in lines}
    assert len(found) == len(lines)
    assert all(line["error"] is None and line["id"].startswith("batch_req_") for line in lines)
    return found


async def run(
    source: Path, output: Path, answer: Callable[[Any], httpx.Response], concurrency: int = 2
) -> tuple[Counts, int]:
    """Run a batch against a function; returns the counts, and how many answers were reported."""
    reported: list[None] = []
    transport = httpx.MockTransport(lambda http: answer(json.loads(http.content)["n"]))
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as http:
        counts = await Batch(source, output, pause_s=0).run(http, concurrency, lambda: reported.append(None))
    return counts, len(reported)


def echo(number: Any) -> httpx.Response:
    """Answer with the number of a request; an odd one is refused."""
    headers = {"x-request-id": f"id{number}"}
    return httpx.Response(400 if number % 2 else 200, json={"n": number}, headers=headers)


async def test_every_request_has_an_answer_refused_ones_too(tmp_path: Path) -> None:
    """A line of output holds the status, the id of the request and the body."""
    source = written(tmp_path / "in", *(request(number) for number in range(5)), "\n")
    counts, reported = await run(source, tmp_path / "new" / "out", echo)
    assert (counts.total, counts.done, counts.refused, counts.left, reported) == (5, 5, 2, 0, 5)
    found = answers(tmp_path / "new" / "out")
    assert found["r3"] == {"status_code": 400, "request_id": "id3", "body": {"n": 3}}
    assert found["r4"]["status_code"] == 200


async def test_a_line_is_one_line_to_every_reader(tmp_path: Path) -> None:
    """Separators of lines that JSON leaves as they are stand escaped in the output; no JSON is text."""
    texts = "a\x85b\u2028c\u2029d\n", '"\\ud800"'
    replies = httpx.Response(200, json=texts[0]), httpx.Response(200, content=texts[1])
    await run(written(tmp_path / "in", request(0), request(1)), tmp_path / "out", lambda n: replies[n])
    assert tuple(each["body"] for _, each in sorted(answers(tmp_path / "out").items())) == texts


@pytest.mark.parametrize("more", ['"respon', '"response": {"status_code": 200}}'])
async def test_a_run_that_was_killed_is_resumed(tmp_path: Path, more: str) -> None:
    """A second run sends no answered request again, and the one whose line was cut off once more."""
    source, sent = written(tmp_path / "in", *(request(number) for number in range(4))), []
    await run(written(tmp_path / "first", request(0), request(1)), tmp_path / "out", echo)
    with (tmp_path / "out").open("a") as file:
        file.write('{"id": "batch_req_1", "custom_id": "r2", ' + more)

    def answer(number: Any) -> httpx.Response:
        sent.append(number)
        return echo(number)

    counts, reported = await run(source, tmp_path / "out", answer)
    assert sorted(sent) == [2, 3]
    assert sorted(answers(tmp_path / "out")) == ["r0", "r1", "r2", "r3"]
    assert (counts.done, counts.refused, reported) == (4, 2, 2)


@pytest.mark.parametrize(
    "busy",
    [httpx.Response(429, headers={"retry-after": "0"}), httpx.DecodingError("gzip"), httpx.Response(503)],
)
async def test_a_busy_server_is_asked_again(tmp_path: Path, busy: Any) -> None:
    """A request that finds the server busy or away is sent again, and answered once."""
    seen: list[Any] = []

    def answer(number: Any) -> httpx.Response:
        seen.append(number)
        if seen.count(number) < ATTEMPTS:
            if isinstance(busy, Exception):
                raise busy
            return httpx.Response(busy.status_code, headers=busy.headers)
        return echo(number)

    counts, _ = await run(written(tmp_path / "in", request(0), request(2)), tmp_path / "out", answer)
    assert counts.left == 0
    assert sorted(answers(tmp_path / "out")) == ["r0", "r2"]


async def test_a_server_that_is_away_ends_the_batch(tmp_path: Path) -> None:
    """The batch ends after as many unanswered requests in a row as are open at once."""
    sent: list[Any] = []

    def answer(number: Any) -> httpx.Response:
        sent.append(number)
        raise httpx.ConnectError("away")

    counts, _ = await run(written(tmp_path / "in", *map(request, range(50))), tmp_path / "out", answer)
    assert counts.left == 50
    assert len(set(sent)) <= 4


@pytest.mark.parametrize(("line", "where"), [*cases(__file__, "test_wrong_lines"), ("[" * 10_000 + "\n", "")])
def test_wrong_lines_are_named_before_anything_is_sent(tmp_path: Path, line: Any, where: str) -> None:
    """The finding has the number of the line and its field."""
    line = request(1, **line) if isinstance(line, dict) else line
    with pytest.raises(RequestInvalid) as refused:
        Batch(written(tmp_path / "in", request(0), line), tmp_path / "out")
    assert refused.value.findings[0].where == f"line 2{where}"


async def test_a_number_that_is_too_large_is_the_answers_matter(tmp_path: Path) -> None:
    """A number beyond a float's is sent, for the API to refuse, and does not end the batch."""
    line = json.dumps(request(0)).replace("}}", ', "seed": 1e999}}')
    counts, _ = await run(written(tmp_path / "in", line), tmp_path / "out", lambda _: httpx.Response(400))
    assert (counts.done, counts.refused) == (1, 1)


@pytest.mark.parametrize("notes", ["my notes\nand more\n", "my notes", '{"custom_id": "a", "response": 1}\n'])
def test_another_file_is_never_appended_to(tmp_path: Path, notes: str) -> None:
    """A file that is no output of a batch is not changed."""
    with pytest.raises(RequestInvalid, match="no output of a batch"):
        Batch(written(tmp_path / "in", request(0)), other := written(tmp_path / "notes", notes))
    assert other.read_text() == notes


def test_two_runs_never_write_one_output(tmp_path: Path) -> None:
    """The second is refused by name until the first ends, and reads what that has written meanwhile."""
    first, second = (Batch(written(tmp_path / "in", request(0)), tmp_path / "out") for _ in range(2))
    with first.alone():
        ran = CliRunner().invoke(app, ["run-batch", str(tmp_path / "in"), str(tmp_path / "out")])
        assert ran.exit_code, ran.output
        assert "another run-batch writes" in str(ran.exception) + ran.output
        written(tmp_path / "out", {"id": "batch_req_1", "custom_id": "r0", "response": {"status_code": 200}})
    with second.alone():
        assert second.counts.left == 0


def test_a_batch_runs_on_a_deployment_that_is_loaded_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--deployment`` answers with the model of the file; the command counts answers and refusals."""
    world, _ = openai_world(tmp_path, built=False)
    file = written(
        tmp_path / "deployment.yaml",
        json.dumps(world.deployment().model_dump(mode="json", exclude_defaults=True)),
    )
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in {"DTYPE": "float32", "KV_MEMORY_GB": "0.01", "ADAPTER_DISK_GB": "0"}.items():
        monkeypatch.setenv(f"LORAMUX_{name}", value)
    message = {"role": "user", "content": "hello"}
    body = {"model": "base", "messages": [message], "max_tokens": 3, "ignore_eos": True}
    lines = [request(0, body=body), request(1, body=body | {"model": "nobody"})]
    source, output = written(tmp_path / "in", *lines), tmp_path / "out"
    ran = CliRunner().invoke(app, ["run-batch", str(source), str(output), "--deployment", str(file), "--json"])
    assert ran.exit_code == 0, ran.stderr
    begin = ran.stdout.index('{\n  "schema"')  # among the log lines of tests
    counted, _ = json.JSONDecoder().raw_decode(ran.stdout, begin)
    assert counted == {"schema": 2, "total": 2, "answered": 2, "refused": 1}
    found = answers(output)
    assert found["r0"]["body"]["usage"]["completion_tokens"] == 3
    assert found["r1"]["status_code"] == 404
