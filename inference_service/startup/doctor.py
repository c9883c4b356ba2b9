"""``python -m inference_service.startup.doctor FOLDER``: what a replica of a base would run on, as JSON.

FOLDER holds the base's ``config.json``. Either form is the answer::

    {"torch": "2.13.0", "device": "cpu", "name": "...", "memory_bytes": 1, "free_bytes": 1,
     "dtype": "bfloat16", "backend": "native", "how": "compiled with c++", "product": "bfloat16 ...",
     "reading": "0.27 GB of weights a token, ...", "warning": null, "threads": 2}
    {"fault": {"reason": "SETTINGS_INVALID", "message": "..."}}
"""

import json
import platform
import sys
from pathlib import Path
from typing import Any, Final

import torch

from inference_service.engine.backends.operations import Backend
from inference_service.engine.models.packed import named
from inference_service.startup.base import reading_of
from inference_service.startup.choose import choose_backend
from inference_service.startup.memory import host_memory
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.read import read_config
from loramux_shared.faults import Fault
from loramux_shared.process import log_to_stderr
from loramux_shared.settings import InferenceSettings, load_settings

SIDE: Final = 2048
"""Side of a square matrix that stands for a linear."""
READ_BYTES: Final = 128 * 2**20
"""Bytes of all matrices together."""


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
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return {
        "torch": torch.__version__,
        **_memory(chosen.device),
        "dtype": named(chosen.dtype),
        "backend": chosen.new_lora().name,
        "how": chosen.computing.how,
        "product": chosen.computing.product,
        "reading": _reading(chosen, config),
        "warning": chosen.computing.warning,
        "threads": torch.get_num_threads(),
    }


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
