"""The cores that this process may compute on, and the NUMA nodes that they and its memory are on."""

import os
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from loramux_shared.control_groups import cpu_quota, read_or_empty
from loramux_shared.wording import counted


def usable_cpus() -> frozenset[int]:
    """Return the logical CPUs that the calling thread may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


@dataclass(frozen=True)
class Cores:
    """The cores of some logical CPUs, and the part of their time that a process may have."""

    cpus: int
    """Logical CPUs."""
    cores: int
    """Cores that these are threads of; two of one core share its units and its way to memory."""
    quota: float | None
    """Cores whose time a control group leaves; None without a limit."""

    @property
    def count(self) -> int:
        """Return how many threads compute best: one a core, and none that would use up the time of others."""
        return self.cores if self.quota is None else min(self.cores, max(1, int(self.quota)))

    @property
    def why(self) -> str:
        """Return what decided the count."""
        if self.count < self.cores:
            return f"a control group leaves the time of {self.quota:g} of {counted(self.cores, 'core')}"
        if self.cores < self.cpus:
            return f"one for each core of {self.cpus} logical CPUs"
        return "one for each core"


def cores_of(cpus: Collection[int], root: Path = Path("/")) -> Cores:
    """Return the cores of logical CPUs; root holds the folders proc and sys."""
    folder = root / "sys/devices/system/cpu"
    siblings = {read_or_empty(folder / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    return Cores(len(cpus), len(siblings), cpu_quota(root))


def numa_risks(cpus: Collection[int], root: Path = Path("/")) -> list[str]:
    """Return what is slow about the NUMA nodes of logical CPUs and of this process's memory; root is as in
    `cores_of`.
    """
    folders = (root / "sys/devices/system/node").glob("node[0-9]*")
    nodes = {int(folder.name[4:]): _numbers(read_or_empty(folder / "cpulist")) for folder in folders}
    near = sorted(node for node, own in nodes.items() if own & set(cpus))
    pages: Counter[int] = Counter()
    for line in read_or_empty(root / "proc/self/numa_maps").splitlines():
        if " anon=" in line:
            pages.update({int(node): int(count) for node, count in re.findall(r" N(\d+)=(\d+)", line)})
    found = []
    if len(near) > 1:
        found.append(
            f"the cores are on NUMA nodes {', '.join(map(str, near))}, and a weight is in the memory of one. "
            "Start a replica on each node: numactl --cpunodebind=N --membind=N"
        )
    if near and sum(pages[node] for node in near) * 2 < pages.total():
        far = max(pages, key=pages.__getitem__)
        found.append(
            f"memory comes from NUMA node {far}, and the cores are on {', '.join(map(str, near))}: weights are "
            f"read from afar. Bind both to one node: numactl --cpunodebind={far} --membind={far}"
        )
    return found


def _numbers(ranges: str) -> set[int]:
    """Return the numbers of a list as 0-3,8 is one."""
    pairs = (part.partition("-") for part in ranges.split(",") if part)
    return {number for first, _, last in pairs for number in range(int(first), int(last or first) + 1)}
