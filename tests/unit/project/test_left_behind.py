"""Leftovers of a test are found, and those that fixtures of a wider scope hold are not."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from tests.support import left_behind

TESTS = """
import os, subprocess, threading
import pytest

@pytest.fixture(scope="module")
def shared():
    os.environ["SHARED"] = "x"
    process = subprocess.Popen(["sleep", "3600"])
    yield
    del os.environ["SHARED"]
    process.kill()
    process.wait()

def test_variable(): os.environ["LEFT"] = "x"
def test_folder(): os.chdir("/")
def test_thread(): threading.Thread(target=os.read, args=(int(os.environ["PIPE"]), 1)).start()
def test_process(): subprocess.Popen(["sleep", "3600"])
def test_clean(monkeypatch):
    monkeypatch.setenv("LEFT", "y")
    subprocess.run(["true"])
def test_shared(shared): assert os.environ["SHARED"]
def test_still_shared(shared): pass
"""


class Errors:
    """A plugin that keeps the failures of teardowns, by the test."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self.passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the report."""
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
    monkeypatch.setattr(left_behind, "ENDING_S", 0.01)
    before, errors = set(psutil.Process().children()), Errors()
    try:
        options = f"-p no:cacheprovider --capture=no -p no:asyncio -c {os.devnull} --rootdir {tmp_path} ."
        pytest.main(options.split(), plugins=[left_behind.LeftBehind(), errors])
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
    assert errors.passed == 7
    assert errors.found.keys() == stated.keys()
    assert all(stated[name] in text for name, text in errors.found.items())
