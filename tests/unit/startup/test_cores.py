"""The cores of a process and the place of its memory, from folders that stand for /proc and /sys."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from inference_service.startup import base
from inference_service.startup.base import OPENMP_VARIABLES, set_threads
from loramux_shared.cores import Cores, cores_of, numa_risks, usable_cpus
from loramux_shared.settings import InferenceSettings
from tests.unit.startup.test_host_memory import V2, write

SETTINGS = InferenceSettings(deployment="none")
V1 = "sys/fs/cgroup/cpu"


def hyperthreads(root: Path, cores: int) -> range:
    """Write a machine whose cores have two threads each, as Linux numbers them; return its logical CPUs."""
    for cpu in range(2 * cores):
        first = cpu % cores
        write(
            root, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{first},{first + cores}\n"
        )
    return range(2 * cores)


def nodes(root: Path, *cpulists: str) -> None:
    """Write NUMA nodes with their CPUs."""
    for node, cpus in enumerate(cpulists):
        write(root, f"sys/devices/system/node/node{node}/cpulist", f"{cpus}\n")


@pytest.fixture
def cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[range]:
    """A machine of four cores with two threads each, and no variable of OpenMP's."""
    before = torch.get_num_threads()
    for name in OPENMP_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    machine = hyperthreads(tmp_path, 4)
    monkeypatch.setattr(base, "usable_cpus", lambda: machine)
    yield machine
    torch.set_num_threads(before)


def test_a_core_counts_once(tmp_path: Path) -> None:
    """Two threads of a core are one; where nothing tells, each logical CPU is a core."""
    assert cores_of({5, 7}, tmp_path) == Cores(2, 2, None)
    every = hyperthreads(tmp_path, 4)
    assert cores_of(every, tmp_path) == Cores(8, 4, None)
    assert cores_of({0, 4}, tmp_path) == Cores(2, 1, None)
    assert cores_of({4, 5}, tmp_path).why == "one for each core"


@pytest.mark.parametrize(
    ("line", "files", "quota"),
    [
        ("0::/pod/it", {f"{V2}/pod/it/cpu.max": "max 100000", f"{V2}/pod/cpu.max": "250000 100000"}, 2.5),
        ("0::/../outside", {f"{V2}/cpu.max": "50000 100000"}, 0.5),
        ("3:cpuacct,cpu:/a", {f"{V1}/a/cpu.cfs_quota_us": "300000", f"{V1}/a/cpu.cfs_period_us": "100000"}, 3),
        ("3:cpu:/a", {f"{V1}/a/cpu.cfs_quota_us": "-1", f"{V1}/a/cpu.cfs_period_us": "100000"}, None),
        ("0::/a", {}, None),
    ],
)
def test_the_narrowest_quota_counts(
    tmp_path: Path, line: str, files: dict[str, str], quota: float | None
) -> None:
    """A limit of either version bounds the threads, in whole cores and never to none."""
    write(tmp_path, "proc/self/cgroup", f"{line}\n")
    for path, text in files.items():
        write(tmp_path, path, f"{text}\n")
    cores = cores_of(range(4), tmp_path)
    assert (cores.quota, cores.count) == (quota, 4 if quota is None else max(1, int(quota)))


def test_threads_are_those_of_the_cores(cpus: range, tmp_path: Path) -> None:
    """A thread computes on each core, ranks divide them, and a quota leaves fewer; each says why."""
    assert set_threads(SETTINGS, tmp_path) == f"one for each core of {len(cpus)} logical CPUs"
    assert torch.get_num_threads() == 4
    assert set_threads(SETTINGS.model_copy(update={"tensor_parallel": 3}), tmp_path).endswith(", of 3 ranks")
    assert torch.get_num_threads() == 1
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    write(tmp_path, f"{V2}/cpu.max", "250000 100000\n")
    assert set_threads(SETTINGS, tmp_path) == "a control group leaves the time of 2.5 of 4 cores"
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("cpus")
def test_settings_and_variables_decide_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of OpenMP's leaves torch its number; LORAMUX_THREADS is before it."""
    torch.set_num_threads(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert set_threads(SETTINGS, tmp_path) == "OMP_NUM_THREADS=3"
    assert torch.get_num_threads() == 3
    assert set_threads(SETTINGS.model_copy(update={"threads": 2}), tmp_path) == "LORAMUX_THREADS"
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("cpus", "maps", "risks"),
    [
        ({0, 1, 8}, "7f00 default anon=90 dirty=90 N0=90\n", []),
        ({0, 4}, "7f00 default anon=90 dirty=90 N0=90\n", ["the cores are on NUMA nodes 0, 1, and"]),
        (
            {0},
            "7f00 bind:1 anon=90 N0=30 N1=60\n7f01 default file=/x N0=999\n",
            ["memory comes from NUMA node 1,"],
        ),
        ({0}, "", []),
    ],
)
def test_cores_and_memory_on_other_nodes_are_a_risk(
    tmp_path: Path, cpus: set[int], maps: str, risks: list[str]
) -> None:
    """Cores of several nodes, and memory far from them, are reported; pages of files do not count."""
    nodes(tmp_path, "0-3,8-11", "4-7", "")
    write(tmp_path, "proc/self/numa_maps", maps)
    found = numa_risks(cpus, tmp_path)
    assert [risk[: len(begin)] for risk, begin in zip(found, risks, strict=True)] == risks
    assert all("numactl --cpunodebind=" in risk for risk in found)


def test_a_machine_without_nodes_has_no_risk(tmp_path: Path) -> None:
    """A kernel without nodes makes no risk."""
    assert numa_risks(usable_cpus(), tmp_path) == []


@pytest.mark.parametrize("service", ["inference_service", "builder_service"])
def test_numpys_products_take_the_thread_that_asks(service: str) -> None:
    """Threads of another library of products would wait awake on the cores of a step, or of other adapters."""
    count = f"import os, {service}.__main__, numpy as np; np.ones((512, 512)) @ np.ones((512, 512))"
    variables = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    command = [sys.executable, "-c", f"{count}; print(len(os.listdir('/proc/self/task')))"]
    assert subprocess.run(command, env=variables, capture_output=True, check=True).stdout.split() == [b"1"]
