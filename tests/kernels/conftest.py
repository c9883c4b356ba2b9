"""The device of the kernel tests, and the backends that hold adapters."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from inference_service.engine.backends.base import LoraBackend
from inference_service.engine.backends.native_lora import NativeLora
from inference_service.engine.backends.torch_lora import TorchLora
from inference_service.engine.backends.triton_lora import TritonLora
from inference_service.engine.kernels.cpu.compiling import kinds_of_machine, kinds_that_run
from inference_service.engine.kernels.cpu.ops import CpuOps
from inference_service.startup.choose import FP8_CAPABILITY
from loramux_shared.faults import SettingsInvalid
from tests.kernels.lora_case import GROUPS, LAYERS
from tests.kernels.place import COMPILED, DEVICE, NO_GPU
from tests.support.native import open_native


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[None]:
    """Skip what only lacks a GPU: of a run without the interpreter, all other failures are defects."""
    return (yield from _without_gpu())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip what only lacks a GPU."""
    return (yield from _without_gpu())


def _without_gpu() -> Iterator[None]:
    try:
        yield
    except (AssertionError, RuntimeError, SettingsInvalid) as error:
        if COMPILED and not torch.cuda.is_available() and str(error).startswith(NO_GPU):
            pytest.skip("no GPU")
        raise


@pytest.fixture(scope="session")
def device() -> str:
    """The device of the kernel tests: the GPU, or the interpreter's CPU."""
    return DEVICE


@pytest.fixture
def fp8_device(device: str) -> str:
    """The same, where it converts to fp8."""
    if device == "cuda" and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        pytest.skip("the GPU does not convert to fp8")
    return device


@pytest.fixture(scope="module", params=["native", *(kind.name for kind in kinds_of_machine())])
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The operations as this machine compiles them, and as a wheel has them for each kind of processor."""
    if request.param != "native":
        if request.param not in {kind.name for kind in kinds_that_run()}:
            pytest.skip(f"the processor is not {request.param}")
        (path,) = request.getfixturevalue("beforehand").glob(f"ops-{request.param}-*.so")
        return ctypes.CDLL(str(path))
    return request.getfixturevalue("compiled")


@pytest.fixture(scope="session")
def compiled(native_folder: Path) -> ctypes.CDLL:
    built = open_native(native_folder)
    if built.library is None:
        pytest.skip(built.how)
    return built.library


@pytest.fixture(params=["native", "torch", "triton"])
def lora(request: pytest.FixtureRequest, device: str) -> LoraBackend:
    """Each backend, with nothing in it."""
    if request.param == "native":
        return NativeLora(CpuOps(request.getfixturevalue("compiled"), torch.float32), GROUPS, LAYERS)
    if request.param == "torch":
        return TorchLora(GROUPS, torch.float32, torch.device(device))
    return TritonLora(GROUPS, LAYERS, torch.float32, torch.device(device))


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of threads of the parameter, which operations use meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
