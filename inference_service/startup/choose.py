"""The choice of a replica's kernels and its device."""

import os
import shutil
import sysconfig
from dataclasses import replace
from functools import partial
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Final

import torch

from inference_service.core.computing import Computing, Lack
from inference_service.engine.backends.deterministic import DeterministicOperations
from inference_service.engine.backends.long_chunks import rows_from_which_torch_is_faster
from inference_service.engine.backends.native import NativeOperations
from inference_service.engine.backends.native_lora import NativeLora
from inference_service.engine.backends.operations import Backend, Operations
from inference_service.engine.backends.torch_lora import TorchLora
from inference_service.engine.backends.triton import TritonOperations
from inference_service.engine.backends.triton_lora import TritonLora
from inference_service.engine.kernels.attention import MIN_BLOCK_SIZE
from inference_service.engine.kernels.cpu import build
from inference_service.engine.kernels.cpu.ops import BLOCK, DTYPES, FEW_ROWS, MAX_HEAD_DIM, NEVER, CpuOps
from inference_service.engine.kernels.launch import interprets
from inference_service.engine.layers.quantized import require_able
from inference_service.engine.models.packed import named
from inference_service.startup.cards import device_of
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.memory import may_stay_packed
from loramux_shared.faults import SettingsInvalid
from loramux_shared.process import open_folder
from loramux_shared.runtime import Rounding
from loramux_shared.settings import InferenceSettings, require_triton, variable

TRITONS: Final = {
    "3.5": "torch 2.9",
    "3.6": "torch 2.10 and 2.11",
    "3.7": "torch 2.12 and 2.13",
    "3.8": "torch 2.14",
    "3.9": "torch 2.15",
}
"""Triton's versions that all kernels compile with, and the torch that brings each."""


CACHE_DTYPES: Final = {"auto": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""Types of keys and values by the setting's words."""
FP8_CAPABILITY: Final = (8, 9)


def choose_backend(settings: InferenceSettings, config: ModelConfig) -> Backend:
    """Return what the settings ask for, or what suits the machine and the model; raise SettingsInvalid where
    the machine does not have it.
    """
    chosen = _kernels(settings, config)
    quantization = settings.rounding
    require_able(quantization, chosen.device, chosen.dtype)
    chosen = replace(chosen, quantization=quantization)
    product = f"{_describe_product(chosen, config)}; {_why(settings, config, chosen.dtype)}"
    return replace(chosen, computing=replace(chosen.computing, product=product))


def _describe_product(chosen: Backend, config: ModelConfig) -> str:
    """Return how a backend multiplies by weights, for the start line."""
    operations, dtype = chosen.operations, named(chosen.dtype)
    rounding = "" if chosen.quantization is Rounding.NONE else str(chosen.quantization)
    if chosen.device.type != "cpu":
        return rounding or dtype
    if not isinstance(operations, NativeOperations):
        return f"{rounding} widened piece by piece by torch" if rounding else f"{dtype} by torch"
    if not rounding and not operations.own_products:
        return f"{dtype} by oneDNN"
    packed = config.quantization
    if not rounding and packed and may_stay_packed(config, operations.keeps):
        rounding = packed.label
    if rounding:
        how = "times rows of 8 bits" if chosen.dtype is torch.bfloat16 else "widened in registers"
        return f"{rounding} {how} ({operations.ops.instructions})"
    return _describe_float_product(operations, chosen.dtype)


def _describe_float_product(operations: NativeOperations, dtype: torch.dtype) -> str:
    """Return how compiled operations multiply by weights that are not rounded."""
    instructions = operations.ops.instructions
    widened = ""
    if dtype is torch.bfloat16 and operations.ops.widened_from.value < NEVER:
        few = f" from {FEW_ROWS} rows on, which is faster here" if "bfloat16" in instructions else ""
        widened = f" widened in registers{few}"
    held = " held in 12 bits" if operations.ops.compacts else ""
    return f"{named(dtype)}{held}{widened} ({instructions})"


def _why(settings: InferenceSettings, config: ModelConfig, dtype: torch.dtype) -> str:
    if settings.dtype != "auto":
        return f"LORAMUX_DTYPE={settings.dtype}"
    if config.dtype == named(dtype):
        return f"the checkpoint is {config.dtype}"
    return (
        f"the checkpoint is {config.dtype or 'of a type that its config does not name'}, which is slower here"
    )


def _kernels(settings: InferenceSettings, config: ModelConfig) -> Backend:
    device = device_of(settings)
    dtype = compute_dtype(settings, config, device)
    cache_dtype = CACHE_DTYPES[settings.kv_cache_dtype]
    if device.type == "cuda":
        check_cache_dtype(settings, torch.cuda.get_device_capability(device))
    groups, num_layers = config.groups, config.dims.num_layers
    if _uses_triton(settings, device):
        _require_compiled(settings, "triton kernels")
        return Backend(
            device,
            dtype,
            TritonOperations(config.heads, dtype, device, cache_dtype),
            lambda: TritonLora(groups, num_layers, dtype, device),
            Computing("triton", "triton kernels"),
            recordable=device.type == "cuda",  # the interpreter runs kernels too, and records nothing
            cache_dtype=cache_dtype,
        )
    ops, found = _native(settings, config, dtype, device)
    if ops is not None:
        if cache_dtype is not None:
            raise SettingsInvalid(
                f"LORAMUX_KV_CACHE_DTYPE={settings.kv_cache_dtype} needs a GPU, found a CPU with compiled "
                "operations, whose cache has the model's type. Set auto, or LORAMUX_BACKEND=torch, which is "
                "slower."
            )
        operations, how = _native_operations(ops, config, found.how, settings)
        computing = replace(found, how=how)
        return Backend(device, dtype, operations, lambda: NativeLora(ops, groups, num_layers), computing)
    if settings.backend == "native":
        raise SettingsInvalid(
            f"LORAMUX_BACKEND=native, but a replica would run on {found.how}. Change that, or set auto."
        )
    _require_compiled(settings, found.how)
    if settings.dtype == "auto" and device.type == "cpu" and not _torch_multiplies_bfloat16():
        dtype = torch.float32
    plain = Operations(dtype, device, cache_dtype)
    lora = partial(TorchLora, groups, dtype, device)
    return Backend(device, dtype, plain, lora, found, cache_dtype=cache_dtype)


def check_cache_dtype(settings: InferenceSettings, capability: tuple[int, int]) -> None:
    """Raise SettingsInvalid for an fp8 cache on a GPU of a capability that cannot convert it."""
    if settings.kv_cache_dtype == "fp8" and capability < FP8_CAPABILITY:
        found = ".".join(map(str, capability))
        raise SettingsInvalid(
            f"LORAMUX_KV_CACHE_DTYPE=fp8 needs a GPU of capability 8.9, found {found}. Set int8, which takes "
            "as much memory and is more exact."
        )


def _native_operations(
    ops: CpuOps, config: ModelConfig, how: str, settings: InferenceSettings
) -> tuple[NativeOperations, str]:
    """Return operations that attend as is fastest on this machine, and for the start line how."""
    if settings.deterministic:
        return DeterministicOperations(ops), how
    rows = rows_from_which_torch_is_faster(ops, config.heads)
    suffix = "" if rows is None else f"; {rows} rows of a prompt and more attend by torch's products"
    return NativeOperations(ops, rows), how + suffix


def _require_compiled(settings: InferenceSettings, how: str) -> None:
    """Raise SettingsInvalid for what compiled operations alone can do, where a replica would have others."""
    if settings.deterministic:
        raise SettingsInvalid(
            f"LORAMUX_DETERMINISTIC=true needs a CPU and compiled operations, found {how}, whose rows may "
            "depend on each other. Set it to false; or LORAMUX_DEVICE=cpu, LORAMUX_BACKEND=auto and "
            "LORAMUX_NATIVE=true, with a C++ compiler."
        )


def compute_dtype(settings: InferenceSettings, config: ModelConfig, device: torch.device) -> torch.dtype:
    """Return the type that a device computes a base in."""
    if settings.dtype != "auto":
        dtype = getattr(torch, settings.dtype)
        assert isinstance(dtype, torch.dtype)  # noqa: S101 - the setting is one of four literals
        return dtype
    if device.type == "cpu":
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(config.dtype, torch.float32)


def _torch_multiplies_bfloat16() -> bool:
    """Return whether torch's products in bfloat16 are faster than those in float32 on this CPU."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _native(
    settings: InferenceSettings, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[CpuOps | None, Computing]:
    """Return the compiled operations, or None, and how that came."""
    if device.type != "cpu":
        return None, Computing(how="torch operations (compiled ones need LORAMUX_DEVICE=cpu)")
    if not settings.native:
        return None, Computing(how="torch operations (LORAMUX_NATIVE=false)")
    if settings.backend == "torch":
        return None, Computing(how="torch operations (LORAMUX_BACKEND=torch)")
    unsupported = _unsupported(settings, config, dtype)
    if unsupported:
        how = f"torch operations ({unsupported})"
        return None, Computing(how=how, lack=Lack.UNSUPPORTED)
    built = build.load(settings.cache_dir / "native")
    if built.library is None:
        return None, Computing(how=built.how, lack=built.lack)
    return CpuOps(built.library, dtype), Computing("native", built.how)


def _unsupported(settings: InferenceSettings, config: ModelConfig, dtype: torch.dtype) -> str | None:
    """Return what compiled operations do not take; None where they take everything."""
    if dtype not in DTYPES:
        return f"compiled operations take float32 and bfloat16, found LORAMUX_DTYPE={settings.dtype}"
    if settings.block_size % BLOCK:
        return f"compiled operations take multiples of {BLOCK}, found LORAMUX_BLOCK_SIZE={settings.block_size}"
    widest = max(heads.dim for heads in config.heads)
    if not 0 < widest <= MAX_HEAD_DIM:
        return f"compiled operations take heads of 1 to {MAX_HEAD_DIM} values, the base has {widest}"
    return None


def _uses_triton(settings: InferenceSettings, device: torch.device) -> bool:
    requested = settings.backend == "triton" or (settings.backend == "auto" and device.type == "cuda")
    if requested:
        require_triton(settings.backend)
    if requested and device.type != "cuda" and not interprets():
        raise SettingsInvalid("LORAMUX_BACKEND=triton needs a CUDA device. Set auto or torch.")
    if requested and settings.block_size < MIN_BLOCK_SIZE:
        raise SettingsInvalid(
            f"LORAMUX_BLOCK_SIZE={settings.block_size}: the triton backend takes {MIN_BLOCK_SIZE} or more."
        )
    if requested and device.type == "cuda":
        names = packages_distributions().get(
            "triton", ["triton"]
        )  # torch's nightly builds bring one of their own
        check_triton(version(names[0]))
        check_triton_cache()
        check_launchers(_python_headers())
    return requested


def check_triton(installed: str) -> None:
    """Raise SettingsInvalid for a Triton that is none of `TRITONS`, which the kernels were compiled with."""
    if ".".join(installed.split(".")[:2]) not in TRITONS:
        known = ", ".join(f"{each} ({torches})" for each, torches in TRITONS.items())
        raise SettingsInvalid(
            f"Triton {installed} is installed, and the kernels are compiled and checked with {known}. Install "
            f"a torch that brings one of these, or set {variable('backend')}=torch."
        )


def check_triton_cache() -> None:
    """Raise SettingsInvalid for a cache of Triton that others may have written, because Triton trusts it."""
    folder = _triton_cache()
    why = open_folder(folder)
    if why is not None:
        raise SettingsInvalid(
            f"TRITON_CACHE_DIR={folder}: it {why}, and code in it is executed. Name a folder that nobody else "
            "can write to, or remove this one."
        )


def check_launchers(headers: Path) -> None:
    """Raise SettingsInvalid where Triton can neither find its launchers in its cache nor compile them.

    headers is the folder of Python's. Without them, the first launch would raise a compiler's error.
    """
    if any(_triton_cache().glob("*/*.so")):
        return
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    lacking = [] if compiler else ["C compiler (gcc)"]
    lacking += [] if (headers / "Python.h").is_file() else ["headers of Python (Python.h)"]
    if lacking:
        raise SettingsInvalid(
            f"Triton compiles its launchers where it runs, and finds no {' and no '.join(lacking)}. Install "
            f"that, or set {variable('backend')}=torch."
        )


def _python_headers() -> Path:
    """Return the folder in which Triton looks for Python's headers."""
    scheme = sysconfig.get_default_scheme()
    return Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme))


def _triton_cache() -> Path:
    return Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache").expanduser().resolve()
