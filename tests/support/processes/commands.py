"""The `loramux` command: as files name it, and as tests run it."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from loramux.cli.main import app
from tests.support.processes.forks import Forked, command_line
from tests.support.waiting import wait_until


def run(*args: str | Path, text: str | None = None) -> tuple[int, str, str]:
    """Run a command in this process; returns its exit code, stdout and stderr."""
    result = CliRunner().invoke(app, [*map(str, args)], input=text)
    return result.exit_code, result.stdout, result.stderr


def assert_takes(name: str, arguments: Sequence[str]) -> None:
    """A command exists, and takes the flags among these arguments."""
    stated = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert stated.exit_code == 0, stated.stderr
    assert all(flag in stated.stdout for flag in arguments if flag.startswith("--"))


@dataclass(frozen=True)
class Command:
    """A running command, and the output that it has written so far."""

    process: Forked
    folder: Path
    stdin: int
    """Descriptor to which its input is written."""

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def errors(self) -> str:
        return (self.folder / "errors").read_text()

    def read_until(self, required: str) -> str:
        """Return the output so far, once a text is part of it."""
        wait_until(
            lambda: required in self.out or self.process.poll() is not None,
            f"{required!r} in its output",
            lambda: (self.out, self.errors),
        )
        assert required in self.out, (self.out, self.errors)
        return self.out

    def end(self, number: signal.Signals | None = None) -> int:
        """Return the exit status, after a signal."""
        if number is not None:
            self.process.send_signal(number)
        return self.process.wait()


@contextmanager
def start_command(folder: Path, *words: str, stdin: bool = True, **environment: str) -> Iterator[Command]:
    """Run a command, with stdin closed or empty until something is written there; it is killed afterwards."""
    reading, writing = os.pipe()
    files = [os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in ("out", "errors")]
    process = command_line(words, [reading if stdin else None, *files], folder, environment)
    try:
        yield Command(process, folder, writing)
    finally:
        process.kill()
        process.wait()
        for file in (reading, writing, *files):
            os.close(file)
