"""The memory and the cores that control groups leave to this process: a container's limit is one of a group."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

UNLIMITED: Final = 1 << 60
"""Bytes from which on a limit is none: version 1 writes a number where version 2 writes max."""


@dataclass(frozen=True)
class MemoryLimit:
    """The limit of a group, and what its processes use; in bytes."""

    num_bytes: int
    used: int
    """Without the pages of files that the kernel drops first where memory is short."""

    @property
    def free(self) -> int:
        """Return what is left of it."""
        return max(0, self.num_bytes - self.used)


@dataclass(frozen=True)
class _Version:
    """The files of a version of control groups."""

    mount: str
    controller: str
    """Second field of the version's line in /proc/self/cgroup."""
    limit: str
    used: str
    inactive: str
    """Field of memory.stat."""


VERSION_2: Final = "sys/fs/cgroup"
"""The mount of version 2; version 1 has one for each controller below it."""
VERSIONS: Final = (
    _Version(VERSION_2, "", "memory.max", "memory.current", "inactive_file"),
    _Version(
        f"{VERSION_2}/memory",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def memory_limit(root: Path = Path("/")) -> MemoryLimit | None:
    """Return the limit that leaves this process the least; None where there is none.

    A group is within others, each of which may have a limit. root holds the folders proc and sys.
    """
    return min(_limits(root), key=lambda limit: limit.free, default=None)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the cores whose time the narrowest limit leaves this process; None where there is no limit.

    root is as in `memory_limit`.
    """
    own = [read_or_empty(group / "cpu.max") for group in _groups(root, VERSION_2, "")]
    own += [
        f"{read_or_empty(group / 'cpu.cfs_quota_us')} {read_or_empty(group / 'cpu.cfs_period_us')}"
        for group in _groups(root, f"{VERSION_2}/cpu", "cpu")
    ]
    pairs = map(str.split, own)
    limits = (words for words in pairs if len(words) == 2 and words[0] not in ("max", "-1"))
    return min((int(quota) / int(period) for quota, period in limits), default=None)


def read_or_empty(file: Path) -> str:
    """Return the text of a file of the kernel; empty where there is none."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _limits(root: Path) -> Iterator[MemoryLimit]:
    for version in VERSIONS:
        for group in _groups(root, version.mount, version.controller):
            if (limit := _limit_of(group, version)) is not None:
                yield limit


def _groups(root: Path, mounted: str, controller: str) -> Iterator[Path]:
    """Yield the group that has this process, and those around it, where a version mounts a controller."""
    lines = read_or_empty(root / "proc/self/cgroup").splitlines()
    mount = root / mounted
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controller in controllers.split(","):
            # A container may see the path of the machine, and its own group where groups are mounted.
            own = mount / path.lstrip("/") if ".." not in Path(path).parts else mount
            yield from (group for group in (own, *own.parents) if group.is_relative_to(mount))


def _limit_of(group: Path, version: _Version) -> MemoryLimit | None:
    try:
        limit, used, stat = (
            (group / name).read_text(encoding="utf-8") for name in (version.limit, version.used, "memory.stat")
        )
    except OSError:
        return None
    if limit.strip() == "max" or int(limit) >= UNLIMITED:
        return None
    inactive = (line.split()[1] for line in stat.splitlines() if line.startswith(f"{version.inactive} "))
    return MemoryLimit(int(limit), max(0, int(used) - int(next(inactive, "0"))))
