"""Processes of a test that need not import torch again: forks of one that did.

They are processes like others, with an exit status, signals and files of their own. Only their start is not the
one of ``python -m``; what that does is shown where ``loramux up``, ``serve`` and ``builder`` are run.
"""

import fcntl
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from tests.support.waiting import BOUND_S

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *("inference_service.__main__", "inference_service.process", "builder_service.__main__"),
        *("loramux", "typer.main", "rich.live", "rich.progress", "rich.table"),  # of commands, but no console
        "tests.contract.adapters.failing_loaders",
    ]
)


class Forked:
    """A process; its methods are those of `subprocess.Popen`."""

    def __init__(self, work: Callable[..., None], *arguments: object) -> None:
        """Run a function of a module that the forks import."""
        self._process: BaseProcess = _CONTEXT.Process(target=work, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = BOUND_S) -> int:
        """Return the exit status, once it has ended."""
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return status

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def inference_service(
    flags: Sequence[str],
    log: Path,
    environment: Mapping[str, str] = os.environ,
    before: Callable[[], None] | None = None,
) -> Forked:
    """Run the service with flags, after a function of a module if given; its log is appended to a file."""
    native = importlib.import_module("tests.support.native")
    native.open_native(native.NATIVE)  # compiles, before the test waits for the service
    return Forked(_run, "inference_service", list(flags), str(log), dict(environment), before)


def builder_service(flags: Sequence[str], log: Path, environment: Mapping[str, str] = os.environ) -> Forked:
    return Forked(_run, "builder_service", list(flags), str(log), dict(environment))


def command_line(
    words: Sequence[str], streams: Sequence[int | None], folder: Path, environment: Mapping[str, str]
) -> Forked:
    """Run ``loramux`` with three descriptors, each None for a closed one; a terminal becomes its own."""
    return Forked(
        _command,
        list(words),
        [stream and _Passed(stream) for stream in streams],
        str(folder),
        {**os.environ, **environment},
    )


class _Passed:
    """A descriptor that is another process's too, once this has been sent there."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> Any:
        return _received, (DupFd(self._descriptor),)


def _received(descriptor: Any) -> int:
    return int(descriptor.detach())


def _command(words: list[str], streams: list[int | None], folder: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.setsid()
    for place, stream in enumerate(streams):
        if stream is None:
            os.close(place)
        else:
            os.dup2(stream, place)
            os.close(stream)
    if streams[0] is not None and os.isatty(0):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    sys.stdin = None if streams[0] is None else open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = ["loramux", *words]
    importlib.import_module("loramux.cli.entry").main()


def _run(
    module: str,
    flags: list[str],
    log: str,
    environment: dict[str, str],
    before: Callable[[], None] | None = None,
) -> None:
    if before is not None:
        before()
    main = importlib.import_module(f"{module}.__main__").main
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.argv = [module, *flags]
    sys.exit(main())
