"""The machine, what a replica would run on here, and the places that it would use."""

import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux_shared.bundle.deployments import list_deployments
from loramux_shared.control_groups import memory_limit
from loramux_shared.cores import usable_cpus
from loramux_shared.faults import Fault
from loramux_shared.process import python
from loramux_shared.storage.open import open_store
from loramux_shared.untrusted_json import parse_json
from loramux_shared.wording import counted


@dataclass(frozen=True)
class Machine:
    """This machine; sizes in bytes."""

    python: str
    system: str
    cores: int
    memory_bytes: int
    memory_limit_bytes: int | None
    """Part of it that a container's limit allows; None where there is none."""
    cache_dir: Path
    cache_free_bytes: int

    @property
    def usable_bytes(self) -> int:
        """Return the memory that processes here may have."""
        return self.memory_bytes if self.memory_limit_bytes is None else self.memory_limit_bytes


@dataclass(frozen=True)
class Inference:
    """The device and the operations of a replica here."""

    device: str
    name: str
    memory_bytes: int
    free_bytes: int
    dtype: str
    backend: str
    how: str
    """Origin of the operations, and why they are not from the compiler if so."""
    product: str
    """Type in which weights are multiplied, and the reason."""
    reading: str
    """Bytes that a token of the base reads, their speed here, and the least time; empty on a GPU."""
    warning: str | None
    """Why it is slower than it could be, what that costs and what to do; None where it is not."""
    threads: int
    cuda: str = ""
    """What drives a card: driver, CUDA of torch, Triton; empty on a CPU."""
    pinned_bytes: int = 0
    """Host memory that a replica on a GPU locks for adapters, at most."""
    risks: Sequence[str] = ()
    """Known problems of a card, or of where memory lies, each with its cure."""
    threads_why: str = ""
    """The reason for the number of threads."""


@dataclass(frozen=True)
class Place:
    """A service or a store."""

    name: str
    address: str
    state: str
    ok: bool


def look_at_machine(cache_dir: Path, root: Path = Path("/")) -> Machine:
    """Return what there is; root is as in `memory_limit`."""
    memory, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), memory_limit(root)
    there = next((folder for folder in (cache_dir, *cache_dir.parents) if folder.exists()), Path("/"))
    return Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=len(usable_cpus()),
        memory_bytes=memory,
        memory_limit_bytes=limit.num_bytes if limit is not None and limit.num_bytes < memory else None,
        cache_dir=cache_dir,
        cache_free_bytes=shutil.disk_usage(there).free,
    )


def look_at_inference(folder: Path) -> Inference | str:
    """Return what a replica of a base would choose here, or why there can be none.

    A child is asked: it imports torch, which this process never does. folder holds a ``config.json``.
    """
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install 'loramux[inference]'"
    command = python("inference_service.startup.doctor", str(folder))
    # Without a deadline: the first start compiles operations, for as long as that takes here.
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own module
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return f"the inference service does not start: {lines[-1]}"
    answer: Mapping[str, Any] = parse_json(done.stdout)
    if "fault" in answer:
        return str(answer["fault"]["message"])
    return Inference(**{name: answer[name] for name in Inference.__dataclass_fields__})


def look_at_store(uri: str) -> Place:
    """Return whether a store answers, and how many deployments it holds."""
    try:
        names = list_deployments(open_store(uri))
    except Fault as fault:
        return Place("store", uri, f"{fault.reason}: {fault.message}", ok=False)
    return Place("store", uri, f"answers, {counted(len(names), 'deployment')}", ok=True)
