"""The memory of a host within a container's limit, from folders that stand for /proc and /sys."""

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from inference_service.startup.memory import host_memory, plan_host_tier
from loramux.cli.doctor.machine import look_at_machine
from loramux_shared.control_groups import MemoryLimit, memory_limit
from loramux_shared.settings import InferenceSettings

MB = 1 << 20
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def group(root: Path, path: str, limit: int | str, used: int, inactive: int = 0) -> None:
    """Make a group of either version, as its kernel shows it."""
    old = path.startswith(V1)
    names = ("limit_in_bytes", "usage_in_bytes") if old else ("max", "current")
    for name, value in zip(names, (limit, used), strict=True):
        write(root, f"{path}/memory.{name}", f"{value}\n")
    stat = f"total_inactive_file {inactive}" if old else f"anon 5\ninactive_file {inactive}"
    write(root, f"{path}/memory.stat", f"inactive_file 7\n{stat}\n" if old else f"{stat}\nactive_file 3\n")


def test_without_a_limit_there_is_the_machine(tmp_path: Path) -> None:
    """No control groups, groups without a limit, and version 1's number for none are no limit."""
    assert memory_limit(tmp_path) is None
    write(tmp_path, "proc/self/cgroup", "4:memory:/a\n0::/a/b\n")
    group(tmp_path, f"{V2}/a/b", "max", 5 * MB)
    group(tmp_path, f"{V1}/a", 9223372036854771712, 5 * MB)
    assert memory_limit(tmp_path) is None
    assert host_memory(tmp_path).total == host_memory(Path("/nowhere")).total
    assert look_at_machine(tmp_path, tmp_path).memory_limit_bytes is None


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("0::/", V2),  # a container's own group
        ("0::/pod/it", f"{V2}/pod/it"),
        ("0::/../outside", V2),
        ("4:memory:/docker/it", V1),  # the machine's path, and the container's group where groups are mounted
        ("4:cpu,memory:/pod/it", f"{V1}/pod/it"),
    ],
)
def test_a_limit_bounds_what_is_free(tmp_path: Path, line: str, path: str) -> None:
    """The limit of either version counts, less what is used; pages of files that can go are free."""
    write(tmp_path, "proc/self/cgroup", f"7:cpuset:/\n{line}\n")
    group(tmp_path, path, 64 * MB, 50 * MB, inactive=10 * MB)
    assert memory_limit(tmp_path) == MemoryLimit(64 * MB, 40 * MB)
    found = host_memory(tmp_path)
    assert (found.total, found.free) == (64 * MB, 24 * MB)
    assert look_at_machine(tmp_path, tmp_path).usable_bytes == 64 * MB


def test_the_group_that_leaves_least_counts(tmp_path: Path) -> None:
    """Groups lie within each other: one around a container bounds it too; none leaves less than 0."""
    write(tmp_path, "proc/self/cgroup", "0::/pod/it/own\n")
    group(tmp_path, f"{V2}/pod/it/own", "max", 1 * MB)
    group(tmp_path, f"{V2}/pod/it", 40 * MB, 1 * MB)
    group(tmp_path, f"{V2}/pod", 64 * MB, 60 * MB)
    assert memory_limit(tmp_path) == MemoryLimit(64 * MB, 60 * MB)
    group(tmp_path, f"{V2}/pod", 64 * MB, 66 * MB)
    assert host_memory(tmp_path).free == 0


def test_adapters_take_half_of_the_hosts_free_memory_at_most() -> None:
    """The setting holds where there is room; in a small container ranks share half, and the log says so."""
    settings = InferenceSettings(deployment="none", adapter_host_gb=2)
    with capture_logs() as logs:
        assert plan_host_tier(settings, 10**10, 2) == 2 * 10**9
    assert not logs
    with capture_logs() as logs:
        assert plan_host_tier(settings, 10**9, 2) == 250_000_000
    assert [(entry["gb"], entry["free_gb"]) for entry in logs] == [(0.25, 1.0)]
