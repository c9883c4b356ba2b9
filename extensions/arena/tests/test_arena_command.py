"""An arena: its files of questions and answers; its output, exit status, and refusals before the run."""

import json
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loramux.cli.main import app
from loramux_arena.command import named
from loramux_arena.kept import AnswerFile
from loramux_arena.questions import read_questions
from loramux_arena.records import Answer
from loramux_shared.faults import ModelNotFound, RequestInvalid, SettingsInvalid
from tests.arena_server import Versions, serving
from tests.support.cases import cases
from tests.support.waiting import loop_in_thread


def lines(path: Path, *provided: object) -> Path:
    """Write lines: text unchanged, anything else as JSON."""
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in provided))
    return path


def test_questions_of_a_file(tmp_path: Path) -> None:
    """A line is a user's turn, or an object; numbers of lines are ids where there are no others."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    file = lines(
        tmp_path / "prompts",
        *(
            "\ufeffHello",
            "",
            {"prompt": "2+2?", "reference": 4, "id": "sum", "tags": ["maths", "maths"], "note": 1},
        ),
        *({"messages": turns, "rubric": "Be kind."}, {"text": "Once", "reference": " upon"}),
    )
    hello, total, talk, text = read_questions(file)
    assert (hello.id, hello.prompt) == ("1", [{"role": "user", "content": "Hello"}])
    assert (total.id, total.reference, total.tags, total.as_text) == ("sum", "4", ("maths",), "2+2?")
    assert (talk.prompt, talk.rubric, talk.as_text) == (turns, "Be kind.", "user: Hi\n\nassistant: Yes?")
    assert (text.id, text.prompt, text.reference) == ("5", "Once", " upon")
    assert read_questions(lines(file, "Hello"), "Be brief.")[0].prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]


BAD: list[tuple[Any, str]] = cases(__file__, "BAD")


@pytest.mark.parametrize(("line", "expected"), BAD)
def test_lines_that_cannot_be_asked_are_named(line: Any, expected: str, tmp_path: Path) -> None:
    """Each bad line has a finding with its number, and a good line beside has none."""
    with pytest.raises(RequestInvalid) as caught:
        read_questions(lines(tmp_path / "prompts", "Hello", line), "Be brief.")
    [finding] = caught.value.findings
    assert expected in str(finding)


def test_files_that_ask_nothing(tmp_path: Path) -> None:
    """A missing file, a binary file and a file without questions have separate messages."""
    (tmp_path / "binary").write_bytes(b"\xff")
    (tmp_path / "empty").write_text("\n")
    for name, reported in (("none", "No such file"), ("binary", "not UTF-8"), ("empty", "asks nothing")):
        with pytest.raises(RequestInvalid, match=reported):
            read_questions(tmp_path / name)


ROW = Answer("k", "m", "d", "q", 0, "text \u2028 \ud83d", False, 1, 2, 0, None, 0.5, 1)


def _keep_on_a_full_disk(path: Path) -> None:
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, most[1]))
    try:
        with AnswerFile(path) as retained:
            retained.put(ROW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)


def test_what_the_disk_refuses_is_reported_with_the_file(tmp_path: Path) -> None:
    """The system names no file when it has no room for more; the failure does, also at its end."""
    with pytest.raises(OSError, match="File too large") as raised:
        _keep_on_a_full_disk(tmp_path / "kept")
    assert raised.value.filename == str(tmp_path / "kept")


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    """A file whose writer was killed in a line continues in the next, and only its owner can read it."""
    path = tmp_path / "kept"
    with AnswerFile(path) as retained:
        retained.put(ROW)
        retained.put(replace(ROW, key="torn"))
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text(path.read_text()[:-9])
    with AnswerFile(path) as retained:
        assert retained.get(Answer, "k") == ROW
        assert retained.get(Answer, "torn") is None
        retained.put(replace(ROW, key="next"))
    with AnswerFile(path) as retained:
        assert len(retained) == 2


@pytest.mark.parametrize(
    "line", ["no JSON", "[]", '{"kind": "other"}', '{"kind": "answer"}', '{"kind": "verdict", "key": 1}']
)
def test_another_file_is_not_written_to(line: str, tmp_path: Path) -> None:
    """A file with other content is refused by line, and is not changed."""
    path = lines(tmp_path / "kept", line, "")
    with pytest.raises(RequestInvalid) as caught:
        AnswerFile(path)
    assert caught.value.findings[0].where == "line 1"
    assert path.read_text() == f"{line}\n"
    with pytest.raises(SettingsInvalid, match="cannot keep answers"):
        AnswerFile(tmp_path)


HOSTILE = "</script><script>document.title='owned'</script>\x1b[2J"


def says(model: str, query: str, seed: int) -> str:
    """``a`` is right, ``b`` hostile, and all of them judge by place."""
    if "ANSWER A" in query or query == "A":
        return "A"
    return {"a": f"{query}!", "b": HOSTILE}.get(model, f"{seed}")


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Versions, str]]:
    """A server in a thread of its own, and its address."""
    service = Versions(says)
    with loop_in_thread() as do:
        server = serving(service)
        yield service, do(server.__aenter__())
        do(server.__aexit__(None, None, None))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": f"q{number}", "prompt": f"p{number}", "reference": f"p{number}!"} for number in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def arena(served: tuple[Versions, str], prompts: Path, *args: object) -> tuple[int, str, str]:
    """Run the command; returns its exit code, stdout and stderr."""
    retained = prompts.with_name("kept.jsonl")
    words = ["arena", "--grpc", served[1], "--prompts", prompts, "--resume", retained, *args]
    result = CliRunner().invoke(app, list(map(str, words)))
    return result.exit_code, result.stdout, result.stderr


def test_tables_for_people(served: tuple[Versions, str], prompts: Path) -> None:
    """A line per version, one per comparison of each score, and notes that say how to read them."""
    code, text, errors = arena(served, prompts, "--models", "base,a,b", "--judge", "base")
    lines = [line.split() for line in text.splitlines()]
    assert code == 0
    assert [line[:3] for line in lines[1:4]] == [
        ["base", "(baseline)", "-"],
        ["a", "a" * 12, "3"],
        ["b", "b" * 12, "3"],
    ]
    assert ["a", "1.000", "+1.000", "+1.000", "to", "+1.000", "3/0/0", "0.250", "0.500"] in lines
    assert ["b", "0.500", "+0.000", "+0.000", "to", "+0.000", "0/3/0", "1.000", "1.000"] in lines
    assert "fewer than 20 questions" in errors
    assert "judge base is one of those that are compared" in errors
    assert "kept.jsonl" in errors


def test_json_and_a_page(served: tuple[Versions, str], prompts: Path, tmp_path: Path) -> None:
    """The JSON document has plan, report and the file of answers; the page escapes markup of answers."""
    page = tmp_path / "report.html"
    code, text, _ = arena(served, prompts, "--models", "a,b", "--baseline", "base", "--json", "--output", page)
    document = json.loads(text)
    assert code == 0
    assert document["plan"]["models"] == ["base", "a", "b"]
    assert document["report"]["scores"][0]["comparisons"][0]["paired"]["wins"] == 3
    rows = [json.loads(line) for line in Path(document["answers"]).read_text().splitlines()]
    assert {row["text"] for row in rows if row["model"] == "b"} == {HOSTILE}
    written = page.read_text()
    assert written.count("<script") == written.count("</script>") == 2
    data = json.loads(written.partition('type="application/json">')[2].partition("</script>")[0])
    assert data["answers"]["b"]["q0"][0][0] == HOSTILE
    assert "default-src 'none'" in written


def test_rows_that_fail_are_named(served: tuple[Versions, str], prompts: Path) -> None:
    """A refused request has a line with its version, question and reason; the next run asks for it alone."""
    service, _ = served
    service.refusals = iter([None, None, RequestInvalid("the prompt is odd.")])
    code, text, errors = arena(served, prompts, "--models", "base,a", "--concurrency", "1")
    assert code == 1
    assert "failed: answer of base, q0: REQUEST_INVALID: the prompt is odd." in text
    assert "--resume" in errors
    service.heard.clear()
    code, text, _ = arena(served, prompts, "--models", "base,a")
    assert code == 0
    assert "5 rows were kept from before" in text
    assert len(service.heard) == 3


@pytest.mark.parametrize(("args", "code", "expected"), cases(__file__, "REFUSED"))
def test_what_cannot_be_done_is_reported_before_anything(
    args: list[str], code: int, expected: str, served: tuple[Versions, str], prompts: Path
) -> None:
    """Wrong flags and names that are not served end the command before a question is answered."""
    served[0].heard.clear()
    found, _, errors = arena(served, prompts, *args)
    assert found == code
    assert expected in errors
    assert all(each.sampling.max_tokens == 1 or each.HasField("constraint") for each in served[0].heard)


def test_scores_need_references(served: tuple[Versions, str], prompts: Path) -> None:
    """A score by reference is refused for a file without references."""
    prompts.write_text("Hello\n")
    code, _, errors = arena(served, prompts, "--score", "strip")
    assert (code, "no prompt of the file has a reference" in errors) == (2, True)
    code, text, _ = arena(served, prompts)
    assert (code, "difference" in text) == (0, False)


def test_names_and_patterns() -> None:
    """A star before a number is a scale; any other one, and a question mark, stand for served names."""
    known = ["base", "ck-1", "ck-2", "ck-10"]
    assert named("base, ck-*", known) == known
    assert named("ck-?,ck-1", known) == ["ck-1", "ck-2"]
    assert named("all", known) == known
    assert named("ck-1*0.5+ck-2*-.5,ck-1@0123abcd", known) == ["ck-1*0.5+ck-2*-.5", "ck-1@0123abcd"]
    with pytest.raises(ModelNotFound):
        named("x?", known)
    with pytest.raises(SettingsInvalid):
        named(" , ", known)


@pytest.fixture
def silent(served: tuple[Versions, str]) -> Iterator[None]:
    """The adapter ``b`` was trained for scores."""
    served[0].silent = frozenset({"b"})
    served[0].heard.clear()
    yield
    served[0].silent = frozenset()


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize(("args", "expected"), cases(__file__, "NO_TEXT"))
def test_who_generates_no_text_is_refused_by_name(
    args: list[str], expected: str, served: tuple[Versions, str], prompts: Path
) -> None:
    """A model that generates no text is refused before any request."""
    code, _, errors = arena(served, prompts, *args)
    assert code == 2
    assert f"{expected}: expected models that generate text" in errors
    assert not served[0].heard


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("args", [[], ["--models", "all"], ["--models", "base,?"]])
def test_who_generates_no_text_is_left_out_of_all(
    args: list[str], served: tuple[Versions, str], prompts: Path
) -> None:
    """A line names the model that generates no text."""
    code, text, errors = arena(served, prompts, *args, "--json")
    assert code == 0
    assert json.loads(text)["plan"]["models"] == ["base", "a"]
    assert "left out, as they generate no text: b" in errors


def test_answers_are_kept_without_being_asked_for(
    served: tuple[Versions, str], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers lie in the state folder without --resume, and its newest files stay."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = tmp_path / "loramux/arena"
    folder.mkdir(parents=True)
    for number in range(25):
        (folder / f"20200101-0000{number:02}-1.jsonl").touch()
    words: list[Any] = ["arena", "--grpc", served[1], "--prompts", prompts, "--models", "a"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0
    files = sorted(folder.iterdir())
    assert len(files) == 20
    assert str(files[-1]) in result.stderr
    assert len(files[-1].read_text().splitlines()) == 3
