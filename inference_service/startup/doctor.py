"""``python -m inference_service.startup.doctor FOLDER``: what a replica of a base would run on, as JSON.

FOLDER holds the base's ``config.json``. Either form is the answer::

    {"torch": "2.13.0", "device": "cpu", "name": "...", "memory_bytes": 1, "free_bytes": 1,
     "dtype": "bfloat16", "backend": "native", "how": "compiled with c++", "product": "bfloat16 ...",
     "reading": "0.27 GB of weights a token, ...", "warning": null, "threads": 2,
     "threads_why": "one for each core", "cuda": "", "pinned_bytes": 0, "risks": []}
    {"fault": {"reason": "SETTINGS_INVALID", "message": "..."}}
"""

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from inference_service.engine.backends.operations import Backend
from inference_service.engine.models.packed import named
from inference_service.startup.base import reading_of, set_threads
from inference_service.startup.cards import driver_version, why_no_card
from inference_service.startup.choose import choose_backend
from inference_service.startup.memory import host_memory, plan_host_tier
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.memory import GB
from loramux_shared.bases.read import read_config
from loramux_shared.cores import numa_risks, usable_cpus
from loramux_shared.faults import Fault
from loramux_shared.process import log_to_stderr
from loramux_shared.settings import InferenceSettings, load_settings

SIDE: Final = 2048
"""Side of a square matrix that stands for a linear."""
READ_BYTES: Final = 128 * 2**20
"""Bytes of all matrices together."""
MAX_OWN_BYTES: Final = 10**9
"""Memory of a card that this process takes before it loads anything, at most: CUDA's context."""


def main() -> int:
    """Answer for the folder that the command line names; returns the exit status."""
    log_to_stderr()
    try:
        answer = examine(Path(sys.argv[1]))
    except Fault as fault:
        answer = {"fault": {"reason": fault.reason, "message": str(fault)}}
    json.dump(answer, sys.stdout)
    return 0


def examine(folder: Path) -> dict[str, Any]:
    """Return what a replica with the settings of this environment would choose for a base.

    Raises:
        CheckpointInvalid: the base is not supported.
        SettingsInvalid: a setting is wrong, or asks for what this machine does not have.
    """
    settings = load_settings(InferenceSettings, deployment="none")
    config = read_config(folder)
    chosen = choose_backend(settings, config)
    why = set_threads(settings)
    answer = {
        "torch": torch.__version__,
        **_memory(chosen.device),
        "dtype": named(chosen.dtype),
        "backend": chosen.new_lora().name,
        "how": chosen.computing.how,
        "product": chosen.computing.product,
        "reading": _reading(chosen, config),
        "warning": chosen.computing.warning,
        "threads": torch.get_num_threads(),
        "threads_why": why,
        **look_at_card(settings, chosen.device, driver_version()),
    }
    if chosen.device.type == "cpu":
        answer["risks"] += numa_risks(usable_cpus())
    return answer


def look_at_card(settings: InferenceSettings, device: torch.device, driver: str | None) -> dict[str, Any]:
    """Return what drives a card, the host memory that a replica would lock, and what may go wrong.

    driver is the version of NVIDIA's; on a CPU beside one, the answer is why no card is used.
    """
    if device.type == "cpu":
        unused = driver is not None and settings.device != "cpu" and not torch.cuda.is_available()
        why = [f"a card is not used: {why_no_card(driver, torch.version.cuda)}"] if unused else []
        return {"cuda": "", "pinned_bytes": 0, "risks": why}
    free, total = torch.cuda.mem_get_info()
    host, ranks = host_memory().free, settings.tensor_parallel or 1
    pinned = ranks * plan_host_tier(settings, host, ranks)
    of_driver = driver or "of unknown version"
    installed = f"NVIDIA driver {of_driver}, torch for CUDA {torch.version.cuda}, Triton {_triton()}"
    return {
        "cuda": installed,
        "pinned_bytes": pinned,
        "risks": risks(settings, used=total - free, pinned=pinned, host=host),
    }


def risks(settings: InferenceSettings, *, used: int, pinned: int, host: int) -> list[str]:
    """Return what may go wrong on a card of which others use so many bytes, beside a host with so many free."""
    found = []
    if used > MAX_OWN_BYTES:
        found.append(
            f"other processes use {used / GB:.1f} GB of the card: a replica plans with what is free now. Set "
            "LORAMUX_KV_MEMORY_GB where they will take more"
        )
    if pinned < (settings.tensor_parallel or 1) * int(settings.adapter_host_gb * GB):
        found.append(
            f"LORAMUX_ADAPTER_HOST_GB={settings.adapter_host_gb:g} is too much for {host / GB:.1f} GB of free "
            f"memory: {pinned / GB:.1f} GB will be locked. Lower it, or give the container more memory"
        )
    return found


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def _reading(backend: Backend, config: ModelConfig) -> str:
    """Return how long a token takes at least, by linears that together are beyond most caches."""
    if backend.device.type != "cpu":
        return ""
    weight = torch.ones(SIDE, SIDE, dtype=backend.dtype)
    linears = [
        backend.operations.new_linear(weight, quantization=backend.quantization)
        for _ in range(READ_BYTES // weight.nbytes)
    ]
    return reading_of(backend, config, linears).reading


def _memory(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
    else:
        memory = host_memory()
        free, total, name = memory.free, memory.total, _processor()
    return {"device": device.type, "name": name, "memory_bytes": total, "free_bytes": free}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.machine())


if __name__ == "__main__":
    sys.exit(main())
