"""The card, its clocks and the versions: without them a number says nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Final

import torch

from benchmarks.on_gpu.device import Device

ROOT: Final = Path(__file__).resolve().parents[2]
FIXED: Final = {"driver": "driver_version", "sm max": "clocks.max.sm", "memory max": "clocks.max.mem"}
STATE: Final = {
    "sm": "clocks.sm",
    "memory": "clocks.mem",
    "temperature": "temperature.gpu",
    "power": "power.draw",
    "limit": "power.limit",
}
"""Labels and fields of ``nvidia-smi --query-gpu``."""
UNITS: Final = {"temperature": " C"}


def describe(device: Device) -> dict[str, str]:
    """Name what is measured and with what."""
    about = {
        "card": "none: a rehearsal",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "host": f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}",
    }
    if device.rehearses:
        return about
    properties = torch.cuda.get_device_properties(device.where)
    about["card"] = (
        f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} "
        f"multiprocessors, {properties.total_memory / 1e9:.0f} GB, L2 {properties.L2_cache_size / 2**20:.0f} MB"
    )
    about["torch"] += f" (CUDA {torch.version.cuda})"
    return about | {"card's limits": query(FIXED), "before": query(STATE)}


def query(fields: dict[str, str]) -> str:
    """Ask ``nvidia-smi`` about the current device; a line that says so where it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader"]
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    for place in ([f"--id=GPU-{uuid}"], []) if uuid else ([],):  # a container may know the card by another name
        try:
            done = subprocess.run([*command, *place], capture_output=True, text=True, timeout=10)  # noqa: S603
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"nvidia-smi does not answer: {error}"
        if done.returncode == 0:
            return read_query(fields, done.stdout)
    return f"nvidia-smi does not answer: {done.stdout.strip() or done.stderr.strip()}"


def read_query(fields: dict[str, str], answer: str) -> str:
    """Label the values of a line of ``nvidia-smi``'s CSV; of several cards the first."""
    values = answer.splitlines()[0].split(", ") if answer.strip() else []
    if len(values) != len(fields):
        return f"nvidia-smi answers {answer.strip()!r}"
    parts = [f"{label} {value}{UNITS.get(label, '')}" for label, value in zip(fields, values, strict=True)]
    return ", ".join(parts)


def commit() -> str:
    """Return the commit of this checkout, and whether files were changed since."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],  # noqa: S607 - whatever git there is
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
