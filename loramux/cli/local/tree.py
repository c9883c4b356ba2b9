"""A tree of processes: children with logs, none of which outlives the parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loramux.cli import shell
from loramux_shared.faults import FAULTS, Fault, ServerUnavailable, Status
from loramux_shared.process import READY, SOCKET, STATUS, python, socket_folder
from loramux_shared.rpc.status import CallFailed
from loramux_shared.untrusted_json import parse_json

DRAIN_S = 120.0  # longer than a service takes to drain; then it is killed
DEATH_NOTICE_S = 0.5  # a broken connection is often seen before the death that broke it
LOOPBACK = "127.0.0.1"


_LAST_WORDS = re.compile(r"^\w+_service: (?P<reason>[A-Z_]+): (?P<message>.*(?:\n  .*)*)", re.MULTILINE)
"""Last line of a service that failed."""


class ServiceDied(Fault, status=Status.INTERNAL):
    """A child that ended by itself."""

    def __init__(self, child: Child) -> None:
        code = child.process.returncode or 0
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        why = " This machine may have run out of memory: see `dmesg`." if code == -signal.SIGKILL else ""
        super().__init__(f"{child.name} ended with {how}; its log is {child.log}.{why}")
        self.last_lines = tail(child.log)

    def __str__(self) -> str:
        return "\n  | ".join([self.message, *self.last_lines])


def ignore(doing: str) -> None:
    """Ignore what a child does."""


@dataclass(frozen=True)
class Child:
    """A running process."""

    name: str
    process: asyncio.subprocess.Process
    log: Path
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it said that it is (see `loramux_shared.process`)."""

    def death(self) -> Fault:
        """Return why it ended: the fault that it named, or `ServiceDied`."""
        named = list(_LAST_WORDS.finditer(self.log.read_text(encoding="utf-8", errors="replace")))
        kind = FAULTS.get(named[-1]["reason"]) if named else None
        return kind(f"{self.name}: {named[-1]['message']}") if kind else ServiceDied(self)


class ProcessTree:
    """Children of this process; leaving the context stops them all."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="loramux-"))
        self.ready = False
        """Set once all is up: from then on a signal is the expected end."""
        self.death: asyncio.Future[Fault] = asyncio.get_running_loop().create_future()
        self._children: list[Child] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._listeners: list[socket.socket] = []
        self._folders = contextlib.ExitStack()
        self._sockets = self._folders.enter_context(socket_folder())
        self._stopping = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        self._folders.close()
        if isinstance(error, Fault) and error.status in (Status.INTERNAL, Status.UNAVAILABLE):
            shell.say(f"logs are kept in {self.folder}", "dim")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    async def start(self, name: str, argv: Sequence[str], tell: Callable[[str], None] = ignore) -> Child:
        """Start a service that is meant to run until it is stopped; tell what it says that it does."""
        child = await self._spawn(name, argv, tell)
        self._tasks.append(asyncio.create_task(follow(child.log, name)))
        self._tasks.append(asyncio.create_task(self._watch(child)))
        return child

    async def serve(self, name: str, argv: Sequence[str], tell: Callable[[str], None] = ignore) -> None:
        """Start a service and wait until it says that it is ready; its death ends the tree."""
        child = await self.start(name, argv, tell)
        await child.ready.wait()

    async def run(self, name: str, argv: Sequence[str]) -> None:
        """Run a command to its end; raises `Child.death` when it fails."""
        child = await self._spawn(name, argv)
        if await child.process.wait():
            raise child.death()

    async def stop(self) -> None:
        """Ask children to end, the last one first, and wait: streams finish while what they need answers."""
        self._stopping = True
        running = [child for child in reversed(self._children) if child.process.returncode is None]
        if running:
            shell.say(f"stopping {' and '.join(child.name for child in running)}", "dim")
        for child in running:
            with contextlib.suppress(ProcessLookupError):
                child.process.terminate()
            try:
                await asyncio.wait_for(child.process.wait(), DRAIN_S)
            except TimeoutError:
                self.kill()
                await child.process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def kill(self) -> None:
        """End all children at once."""
        for child in self._children:
            if child.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.kill()

    async def _spawn(self, name: str, argv: Sequence[str], tell: Callable[[str], None] = ignore) -> Child:
        log = self.folder / f"{name}.log"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listener.bind(str(self._sockets / name))
        wrapped = python("loramux.cli.local.child", str(os.getpid()), *argv)
        with log.open("ab") as file:
            # A separate process group: Ctrl-C reaches the parent alone, which then drains the services.
            process = await asyncio.create_subprocess_exec(
                *wrapped,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                process_group=0,
                env={**_environment(), SOCKET: str(listener.getsockname())},
            )
        child = Child(name, process, log)
        self._children.append(child)
        self._listen(listener, child.ready, tell)
        return child

    def _listen(self, listener: socket.socket, ready: asyncio.Event, tell: Callable[[str], None]) -> None:
        """Set ready at the message that says so, and tell what those before it say."""
        loop = asyncio.get_running_loop()

        def hear() -> None:
            for line in listener.recv(4096).decode(errors="replace").split("\n"):
                if line == READY:
                    ready.set()
                elif line.startswith(STATUS):
                    tell(line.removeprefix(STATUS))

        loop.add_reader(listener, hear)
        self._listeners.append(listener)

    async def _watch(self, child: Child) -> None:
        await child.process.wait()
        if not self._stopping and not self.death.done():
            self.death.set_result(child.death())


def _environment() -> dict[str, str]:
    """Return a child's environment.

    It has no TLS, whose certificates name other hosts than the loopback we call it on.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("LORAMUX_TLS_")}


def run_tree(work: Callable[[ProcessTree], Awaitable[None]]) -> None:
    """Run work beside its child processes; none is left when this returns or raises.

    A signal before the tree is ready raises KeyboardInterrupt, and after that it is the normal end. A second
    signal kills the children.

    Raises:
        Fault: a child ended unasked; `ServiceDied` where it did not say why.
    """
    asyncio.run(_run(work))


async def _run(work: Callable[[ProcessTree], Awaitable[None]]) -> None:
    async with ProcessTree() as tree:
        with _signals(tree) as stop:
            task = asyncio.ensure_future(work(tree))
            ends: set[asyncio.Future[Any]] = {task, tree.death, stop}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and isinstance(task.exception(), ServerUnavailable | CallFailed):
                await asyncio.wait({tree.death}, timeout=DEATH_NOTICE_S)
            task.cancel()
            await asyncio.wait({task})
            await tree.stop()
            if tree.death.done():
                raise tree.death.result()
            if not task.cancelled():
                task.result()
            elif not tree.ready:
                raise KeyboardInterrupt


@contextlib.contextmanager
def _signals(tree: ProcessTree) -> Iterator[asyncio.Future[None]]:
    """Give a future that the first signal sets; the next one kills the children."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def on_signal() -> None:
        if stop.done():
            tree.kill()
        else:
            stop.set_result(None)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def listening_address(requested: str, usual: str) -> str:
    """Return the requested address, with a free port for port 0; else the usual one, or a free one."""
    host, _, port = requested.rpartition(":")
    if port == "0":
        return f"{host}:{free_address().rpartition(':')[2]}"
    return requested or free_address(usual)


def free_address(preferred: str = f"{LOOPBACK}:0") -> str:
    """Return the preferred address if nothing listens there, else one with a free port.

    A private service prefers none: two that want the same one at the same moment both find it free.
    """
    port = int(preferred.rpartition(":")[2])
    for candidate in (port, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, candidate))
            except OSError:
                continue
            return f"{LOOPBACK}:{probe.getsockname()[1]}"
    raise ServerUnavailable("this machine has no free port left")


TAIL_LINES = 12
POLL_S = 0.2
# Levels as structlog and Python's logging write them, and our last line when a start fails.
_MATTERS = re.compile(
    r"\[\s*(warning|error|critical)\s*\]|^(error|warning|fatal)\b|\b(ERROR|WARNING|CRITICAL)\b"
)
_LEVELS = frozenset({"warning", "error", "critical"})
_REPORTED = frozenset({"build failed"})
"""Events that the command which waits for them tells itself, as its own failure."""
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


async def follow(log: Path, name: str) -> None:
    """Print the lines that matter as they come, until cancelled."""
    with log.open(encoding="utf-8", errors="replace") as file:
        rest = ""
        while True:
            *lines, rest = (rest + file.read()).split("\n")
            for line in lines:
                if matters := important(line):
                    shell.say(f"{name}: {matters}", "yellow")
            await asyncio.sleep(POLL_S)


def important(line: str) -> str:
    """Return a log line as one that a person reads, or "" for one that can stay in the log."""
    line = _ANSI.sub("", line).strip()
    if not line.startswith("{"):
        return line if _MATTERS.search(line) else ""
    try:
        fields = parse_json(line)
    except ValueError:
        return ""
    if str(fields.pop("level", "")).lower() not in _LEVELS:
        return ""
    event = fields.pop("event", "")
    if event in _REPORTED:
        return ""
    for noise in ("timestamp", "logger", "exception", "stack"):
        fields.pop(noise, None)
    return " ".join([str(event), *(f"{name}={value}" for name, value in fields.items())])


def tail(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """Return the last lines of a log that may say why it ends; a record of what went well does not."""
    text = log.read_text(encoding="utf-8", errors="replace")
    important_lines = [line for line in text.splitlines() if not line.startswith("{") or important(line)]
    return [_ANSI.sub("", line) for line in important_lines[-lines:]]
