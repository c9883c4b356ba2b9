"""The checks of these tests and texts: leftovers of a test, words, and numbers in text."""

import os
from pathlib import Path

import psutil
import pytest

from loramux_shared.wording import is_number, is_whole, refuse_odd
from scripts import words
from tests.support import left_behind


@pytest.mark.parametrize(
    "text",
    [
        "The request of whoever asks.",
        "serves_no_more = 1",
        "class QueryGrowth: ...",
        "# It is there no\n    # more.",
        "the adapter works no more",
    ],
)
def test_a_word_is_found_in_prose_and_in_names(text: str) -> None:
    """A refused word is found across lines, and within identifiers in either spelling."""
    assert [match for match in words.words_in("some.py", text) if not match.exempt]


@pytest.mark.parametrize("code", ["said = 1", "def f(said): ...", "def _said(): ...", "class Said: ..."])
def test_a_name_says_what_a_thing_is(code: str) -> None:
    """A refused name is found where it is bound; a longer one, an attribute and a keyword are not."""
    assert [match.line for match in words.names_in("some.py", code)] == [1]
    assert not list(words.names_in("some.py", "what_was_said = it.said = f(said=1)"))


TESTS = """
import os, subprocess, threading

def test_variable(): os.environ["LEFT"] = "x"
def test_folder(): os.chdir("/")
def test_thread(): threading.Thread(target=os.read, args=(int(os.environ["PIPE"]), 1)).start()
def test_process(): subprocess.Popen(["sleep", "3600"])
"""


class Errors:
    """A plugin that keeps the failures of teardowns, by the test."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self.passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        if report.when == "teardown" and report.failed:
            self.found[report.nodeid.partition("::test_")[2]] = str(report.longrepr)


def test_what_tests_leave_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable, a working directory, a thread and a process are each an error of the test that left them."""
    (tmp_path / "test_leaks.py").write_text(TESTS)
    reading, writing = os.pipe()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIPE", str(reading))
    monkeypatch.setenv("LEFT", "before")
    before, errors = set(psutil.Process().children()), Errors()
    try:
        options = f"-p no:cacheprovider --capture=no -p no:asyncio -c {os.devnull} --rootdir {tmp_path} ."
        pytest.main(options.split(), plugins=[left_behind.LeftBehind(ending_s=0.01), errors])
    finally:
        os.close(writing)
        for process in set(psutil.Process().children()) - before:
            process.kill()
            process.wait()
    os.close(reading)
    stated = {
        "variable": "LEFT='x'",
        "folder": "directory /,",
        "thread": "<Thread",
        "process": "psutil.Process",
    }
    assert errors.passed == 4
    assert errors.found.keys() == stated.keys()
    assert all(stated[name] in text for name, text in errors.found.items())


def test_what_is_a_number() -> None:
    """Digits from 0 to 9, as JSON has them, or with a plus, or a point at an end."""
    for text in ("0", "12", "-1", "+0.5", ".5", "5.", "1e-3", "1.5E+2"):
        assert is_number(text)
    for text in ("", " 1", "1 ", "1_0", "٣", "inf", "nan", "0x1", "1e", ".", "1e1_0"):
        assert not is_number(text)
    assert [text for text in ("0", "007", "-1", "1_0", "٣", "9" * 19, "1.0") if is_whole(text)] == ["0", "007"]


def test_fields_refuse_what_python_alone_reads() -> None:
    """Fields for numbers refuse Python's other spellings; a text that is no number at all is left to others."""
    for text in ("1_0", " 1", "٣"):
        with pytest.raises(ValueError, match="digits 0 to 9"):
            refuse_odd(text, int | None)
        assert refuse_odd(text, str) == text
    for value in ("12", "auto_", "inf", 12, None):
        assert refuse_odd(value, float) == value
