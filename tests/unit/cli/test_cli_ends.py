"""The ends of commands: exit codes, and never a traceback."""

import os
from pathlib import Path

import grpc
import pytest

from loramux.cli.exits import Exit, exit_of, state_dir, tell_uncaught
from loramux_shared.faults import (
    AdapterInvalid,
    Fault,
    ModelNotFound,
    QueueFull,
    RepoGated,
    ServerUnavailable,
    SettingsInvalid,
    StoreUnavailable,
    Unauthenticated,
)
from loramux_shared.rpc.status import CallFailed
from tests.support.fake_services import Fakes
from tests.support.forks import command_line


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (AdapterInvalid("no"), Exit.FAILED),
        (ModelNotFound("no"), Exit.FAILED),
        (SettingsInvalid("no"), Exit.USAGE),
        (ServerUnavailable("no"), Exit.UNAVAILABLE),
        (StoreUnavailable("no"), Exit.UNAVAILABLE),
        (QueueFull("no"), Exit.UNAVAILABLE),
        (CallFailed("late", grpc.StatusCode.DEADLINE_EXCEEDED), Exit.UNAVAILABLE),
        (CallFailed("strange", grpc.StatusCode.UNKNOWN), Exit.FAILED),
        (Unauthenticated("no"), Exit.DENIED),
        (RepoGated("no"), Exit.DENIED),
    ],
)
def test_exit_codes(fault: Fault, code: Exit) -> None:
    """Faults that a retry can cure, faults of rights and other faults have different exit codes."""
    assert exit_of(fault) is code


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_reader_that_goes(fakes: Fakes, tmp_path: Path, flags: list[str]) -> None:
    """The command ends with 141 and no message when its reader closes the pipe, as ``| head`` does."""
    reading, writing = os.pipe()
    os.close(reading)
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        words = ["models", "--grpc", fakes.inference_address, *flags]
        process = command_line(words, [None, writing, file.fileno()], tmp_path, {})
    os.close(writing)
    assert (process.wait(), errors.read_text()) == (141, "")


def test_an_error_of_ours_is_one_line_and_a_file(tmp_path: Path, monkeypatch, capsys) -> None:
    """An unforeseen exception is one line that names the file with its traceback."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    error = ZeroDivisionError("one\nhalf")
    tell_uncaught(type(error), error, None)
    file = tmp_path / "loramux" / "traceback.txt"
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"error: INTERNAL: ZeroDivisionError: one half. Please report it with {file}."
    assert "ZeroDivisionError" in file.read_text()


def test_what_the_system_refuses_is_no_mistake_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk is an error with the file, without a request to report a bug."""
    error = OSError(28, "No space left on device", "/a/plot.png")
    tell_uncaught(type(error), error, None)
    assert capsys.readouterr().err == "error: SYSTEM: No space left on device: /a/plot.png\n"


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert state_dir().is_dir()
