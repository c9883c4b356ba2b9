"""Waiting among the threads of a step."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from inference_service.engine.kernels.cpu import spin
from inference_service.engine.kernels.cpu.spin import LOOK_S, REST_S, IdleTeams, Spin, Spinning
from tests.support.waiting import wait_until

S = 10**9


class Machine:
    """A clock, the kernel's counts of two threads, and the switch."""

    def __init__(self, tasks: Path, spin: Spin = "auto") -> None:
        self.tasks, self.now_s, self.asleep = tasks, 0.0, False
        self._counts = {str(threading.get_native_id()): [0, 0], "other": [0, 0]}
        self.spinning = Spinning(spin, self._switch, tasks, lambda: self.now_s)
        self.write()

    def passes(self, ran: float, waited: float, seconds: float = LOOK_S) -> bool:
        """Let the engine's thread run, and the other one wait, for parts of some seconds; look."""
        self.now_s += seconds
        mine, other = self._counts.values()
        mine[0] += int(ran * seconds * S)
        other[1] += int(waited * seconds * S)
        self.write()
        self.spinning.look()
        return self.asleep

    def _switch(self, *, live: bool) -> None:
        self.asleep = live

    def write(self) -> None:
        for name, (ran, waited) in self._counts.items():
            (self.tasks / name).mkdir(exist_ok=True)
            (self.tasks / name / "schedstat").write_text(f"{ran} {waited} 7\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_threads_sleep_while_they_wait_for_cores(machine: Machine) -> None:
    """Threads spin on free cores, sleep while other work has the cores, and spin again afterwards."""
    assert [machine.passes(ran=1.0, waited=0.02) for _ in range(3)] == [False] * 3
    assert machine.passes(ran=0.7, waited=0.7)
    assert machine.passes(ran=0.5, waited=0.5, seconds=REST_S)
    assert not machine.passes(ran=1.0, waited=0.1, seconds=REST_S)


def test_between_the_two_thresholds_everything_stays(machine: Machine) -> None:
    """A load that is too small to sleep for is enough to sleep on: nothing flickers."""
    machine.passes(ran=1.0, waited=0.0)
    assert not machine.passes(ran=1.0, waited=0.55)
    assert machine.passes(ran=1.0, waited=0.8)
    assert machine.passes(ran=1.0, waited=0.55, seconds=REST_S)


def test_an_idle_engine_learns_nothing(machine: Machine) -> None:
    """A time in which the threads hardly ran does not change how they wait."""
    machine.passes(ran=1.0, waited=0.0)
    assert not machine.passes(ran=0.01, waited=1.0)


def test_threads_sleep_where_the_kernel_does_not_count(machine: Machine) -> None:
    """Threads sleep where the kernel reports no waiting times."""
    for file in machine.tasks.glob("*/schedstat"):
        file.unlink()
    machine.write = lambda: None  # type: ignore[method-assign]
    assert machine.passes(ran=1.0, waited=0.0)


@pytest.mark.parametrize(("spin", "asleep"), [("always", False), ("never", True)])
def test_a_setting_decides_once(tmp_path: Path, spin: Spin, asleep: bool) -> None:
    """A setting of always or never is not changed by what is measured."""
    machine = Machine(tmp_path, spin)
    assert [machine.passes(ran=0.5, waited=waited) for waited in (0.9, 0.9, 0.0)] == [asleep] * 3


@pytest.fixture
def two_threads() -> Iterator[None]:
    """An operation of torch is shared by two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("cores", [1, 2, 4])
def test_idle_teams_are_more_threads_than_cores(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads of idle teams count: with those of a step there are more than cores, so all sleep."""
    monkeypatch.setattr(spin, "usable_cpus", lambda: range(cores))
    threads, before, teams = 2, _tasks(), IdleTeams()
    teams(live=True)
    began = _tasks() - before
    assert len(began) == 2 * (cores - 1)  # of each team one thread waits in Python, and one in libgomp
    assert threads + len(began) // 2 > cores
    teams(live=True)
    assert _tasks() - before == began
    teams(live=False)
    wait_until(lambda: not _tasks() & began, "the end of the teams")


def _tasks() -> set[str]:
    return {each.name for each in Path("/proc/self/task").iterdir()}
