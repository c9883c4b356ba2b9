"""The check for leftovers: a test that leaves something behind fails, and names it.

That is an environment variable, the working directory, a thread that keeps a process alive, or a child process.
Leftovers of a fixture of a module or of the session are the fixture's, and so are threads and processes that
come into being while such a fixture is in use: they are looked for once more when it is gone.
"""

import gc
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import psutil
import pytest

Alive: TypeAlias = "threading.Thread | multiprocessing.process.BaseProcess | psutil.Process"
STARTS: Final = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn"})
"""Python's audit events of processes: only after one of them is the table of all processes worth reading."""
HELPERS: Final = ("multiprocessing.forkserver", "multiprocessing.resource_tracker", ".sandbox")
"""Processes that stay for as long as the one that started them: Python's own, and those of sandboxes."""
POOLS: Final = ("templates_",)
"""The names of threads of which there are some for a whole process."""
LIBRARIES: Final = ("PYTEST_", "RAY_", "TORCHINDUCTOR_", "KINETO_")
"""Prefixes of variables that the test runner and libraries write by themselves."""
HARMLESS: Final = frozenset({"_soon_settled", "event_loop_policy", "native_folder", "tmp_path_factory"})
"""Fixtures that hold neither threads nor processes."""
ENDING_S: Final = 60.0
"""For what was asked to end and is about to."""


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(LIBRARIES)}


def _folder() -> str:
    return str(Path.cwd())


def _runs(each: Alive) -> bool:
    if not isinstance(each, psutil.Process):
        return each.is_alive()
    try:
        return each.is_running() and each.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_helper(process: psutil.Process) -> bool:
    try:
        return any(helper in word for word in process.cmdline() for helper in HELPERS)
    except psutil.NoSuchProcess:
        return True


@dataclass(eq=False)
class _Shared:
    """The changes of a fixture of a wider scope."""

    before: Mapping[str, str]
    after: Mapping[str, str]
    folders: tuple[str, str]


@dataclass(eq=False)
class LeftBehind:
    """A plugin of pytest."""

    ending_s: float = ENDING_S
    _environment: dict[str, str] = field(default_factory=_environment)
    _folder: str = field(default_factory=_folder)
    _known: set[Alive] = field(default_factory=set)
    _shared: dict[Any, _Shared] = field(default_factory=dict)
    _suspects: dict[Alive, tuple[str, frozenset[Any]]] = field(default_factory=dict)
    _started: bool = False

    def __post_init__(self) -> None:
        sys.addaudithook(self._hear)

    def _hear(self, event: str, _: object) -> None:
        if event in STARTS:
            self._started = True

    def _alive(self) -> set[Alive]:
        alive: set[Alive] = {
            each for each in threading.enumerate() if not each.daemon and not each.name.startswith(POOLS)
        }
        alive.update(multiprocessing.active_children())
        if self._started:
            children = psutil.Process().children()
            alive.update(each for each in children if _runs(each) and not _is_helper(each))
        return alive

    def pytest_collection_finish(self) -> None:
        """Begin with the state after the import of all tests."""
        self._environment, self._folder, self._known = _environment(), _folder(), self._alive()

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
        """Note the changes of a fixture of a wider scope."""
        if fixturedef.scope == "function":
            return (yield)
        before, folder, alive = _environment(), _folder(), self._alive()
        try:
            return (yield)
        finally:
            shared = _Shared(before, _environment(), (folder, _folder()))
            self._shared[fixturedef] = shared
            self._change(shared.before, shared.after, shared.folders)
            self._known |= self._alive() - alive

    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        """Check that the fixture reverted its changes."""
        if shared := self._shared.pop(fixturedef, None):
            self._change(shared.after, shared.before, shared.folders[::-1])

    def _change(self, old: Mapping[str, str], new: Mapping[str, str], folders: tuple[str, str]) -> None:
        for name in old.keys() - new.keys():
            self._environment.pop(name, None)
        self._environment.update({name: new[name] for name in new if old.get(name) != new[name]})
        if folders[0] != folders[1]:
            self._folder = folders[1]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """Look around when all fixtures of a test, and those that no later test uses, are gone."""
        try:
            return (yield)
        finally:
            left = [*self._changes(), *self._stayed(item)]
            if left:
                pytest.fail("left behind: " + "; ".join(left), pytrace=False)

    def _changes(self) -> list[str]:
        now, known = _environment(), self._environment
        changes = [
            f"{name}={now.get(name)!r} in the environment, before {known.get(name)!r}"
            for name in sorted(now.keys() | known.keys())
            if now.get(name) != known.get(name)
        ]
        self._environment = now
        if (folder := _folder()) != self._folder:
            changes.append(f"the working directory {folder}, before {self._folder}")
            self._folder = folder
        return changes

    def _stayed(self, item: pytest.Item) -> list[str]:
        if not (new := self._alive() - self._known) and not self._suspects and not self._started:
            return []
        used = frozenset(
            each
            for each in self._shared
            if each.argname in item.fixturenames and each.argname not in HARMLESS  # type: ignore[attr-defined]
        )
        for each in new - self._suspects.keys():
            self._suspects[each] = (item.nodeid, used)
        due = [each for each, (_, owners) in self._suspects.items() if not owners & self._shared.keys()]
        if any(map(_runs, due)):
            getattr(item, "funcargs", {}).clear()
            gc.collect()  # the threads of a pool end with it
        ends = time.monotonic() + self.ending_s
        while any(map(_runs, due)) and time.monotonic() < ends:
            time.sleep(0.01)
        stayed = [f"{each} of {self._suspects[each][0]}" for each in due if _runs(each)]
        for each in due:
            del self._suspects[each]
        self._known = {each for each in self._known | set(due) if _runs(each)}
        self._started = any(isinstance(each, psutil.Process) for each in (*self._known, *self._suspects))
        return stayed
