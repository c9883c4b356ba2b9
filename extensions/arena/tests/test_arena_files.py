"""The two files of an arena: questions and stored answers."""

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loramux_arena.kept import AnswerFile
from loramux_arena.questions import read_questions
from loramux_arena.records import Answer
from loramux_shared.faults import RequestInvalid, SettingsInvalid
from tests.support.cases import cases


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
