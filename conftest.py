"""Fixtures and options of all tests.

Collecting imports every test, in every worker. The controller of workers imports none, and so nothing here
imports what only tests need before it is needed.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys

# What a test starts finds what was compiled before, also where this environment would have nothing kept.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    sys.dont_write_bytecode = False
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As of `nohup make test &` in a script. What a test starts would inherit it, and end at no Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; two that both compute on all of them wait for each other at every barrier.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Services of tests leave nothing below a home; what they compile serves all workers, and later runs.
os.environ.setdefault("LORAMUX_CACHE_DIR", str(Path(__file__).with_name(".pytest_cache") / "d" / "loramux"))

from tests.support.examples import SWEEPING

if TYPE_CHECKING:
    from loramux_shared.storage.memory import MemoryStore
    from tests.support.s3_gateway import S3Server
    from tests.support.services.fake_grpc import Fakes
    from tests.support.tiny import World


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --sweep, --reverse and --apart."""
    parser.addoption("--sweep", action="store_true", help="run the long sweeps too")
    parser.addoption("--reverse", action="store_true", help="run the last test first")
    parser.addoption("--apart", action="store_true", help="run contract tests with APIs as in an API process")


def pytest_plugin_registered(plugin: object, manager: pytest.PytestPluginManager) -> None:
    """Prepare a process that runs tests, before another conftest.py imports what is tested."""
    if plugin is sys.modules[__name__] and _runs_tests(manager.get_plugin("pytestconfig")):
        _prepare()


def pytest_configure(config: pytest.Config) -> None:
    """Let properties be tried with more examples in a sweep, and look at what tests leave behind."""
    if config.getoption("--sweep"):
        os.environ[SWEEPING] = "1"
    if _runs_tests(config):
        from tests.support.left_behind import LeftBehind

        config.pluginmanager.register(LeftBehind())


def _runs_tests(config: pytest.Config) -> bool:
    """Return whether this is no controller of workers."""
    workers = getattr(config.known_args_namespace, "numprocesses", None)
    return "PYTEST_XDIST_WORKER" in os.environ or not workers


def _prepare() -> None:
    import structlog
    import torch
    from hypothesis import HealthCheck, settings

    if not torch.cuda.is_available():
        # Without a GPU, kernels run in Triton's interpreter: to be chosen before anything imports Triton.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.support import interpreter

        interpreter.quicken()
    # Plain tracebacks: a log with one that rich paints, with all variables, takes longer than most tests.
    plain = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[*structlog.get_config()["processors"][:-1], plain])
    # How long an example takes says how busy the machine is, and nothing of the property.
    settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("unhurried")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect no garbage while millions of objects of libraries and tests come to stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    """Let libraries find at their end that all of theirs is gone."""
    gc.unfreeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests marked `sweep` unless they are asked for; those marked `whole` come first.

    An idle worker takes tests from the end of another's. A module in the middle of which that happens makes its
    fixtures twice, a cluster of Ray for example.
    """
    if config.getoption("--reverse"):
        items.reverse()
    items.sort(key=lambda item: item.get_closest_marker("whole") is None)
    if not config.getoption("--sweep"):
        for item in items:
            if item.get_closest_marker("sweep"):
                item.add_marker(pytest.mark.skip(reason="a long sweep: run it with --sweep"))


@pytest.fixture(autouse=True, scope="session")
def _soon_settled() -> Iterator[None]:
    """Folders that a test has just written are listed after 20 ms, two ticks of any file system here."""
    from loramux_shared.sources import local

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "SETTLED_NS", 20_000_000)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    """Let a fixture of many tests draw the same, whichever of them comes first."""
    if fixturedef.scope != "function":
        _draw_from_the_start()


def _draw_from_the_start() -> None:
    import torch

    torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_draws(request: pytest.FixtureRequest) -> Iterator[None]:
    """Requests without a seed have the same seeds in every run of a test, and torch draws the same: no luck."""
    _draw_from_the_start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secrets.randbits", random.Random(request.node.nodeid).getrandbits)  # noqa: S311
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server, started at its first use."""
    from tests.support.s3_gateway import s3_gateway

    with s3_gateway() as server:
        yield server


@pytest.fixture(scope="session")
def native_folder() -> Path:
    """A folder with the compiled operations of a start; the compiler may be missing."""
    from tests.support.native import NATIVE, open_native

    open_native(NATIVE)
    return NATIVE


@pytest.fixture(scope="session")
def beforehand() -> Path:
    """A folder of what a wheel holds, for each kind of processor, but quickly compiled; in a sweep just so."""
    from inference_service.engine.kernels.cpu import compiling
    from tests.support.native import compiled_as_in_a_wheel

    if (compiler := compiling.compiler()) is None:
        pytest.skip("no C++ compiler")
    return compiled_as_in_a_wheel(compiler)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, MemoryStore]:
    """A tiny Llama with three adapters, built."""
    from loramux_shared.storage.memory import MemoryStore
    from tests.support.tiny import make_world

    world, store = make_world(tmp_path_factory.mktemp("tiny")), MemoryStore()
    world.build(store)
    return world, store


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, MemoryStore]:
    """A tiny Llama with a chat template and three adapters, built; nobody may change its store."""
    from tests.support.openai_api import openai_world

    return openai_world(tmp_path_factory.mktemp("gateways"))


@pytest.fixture(scope="module")
def fakes() -> Iterator[Fakes]:
    """Both services, scripted, in a thread of this process."""
    from tests.support.services.fake_grpc import open_fakes

    with open_fakes() as running:
        yield running


@pytest.fixture
def deployment(tmp_path: Path) -> Callable[..., str]:
    """Writes a deployment file of a name and adapters, and returns its path."""
    from tests.support.services.fake_grpc import deployment_text

    def write(name: str, *adapters: str) -> str:
        path = tmp_path / "deployment.yaml"
        path.write_text(deployment_text(name, *adapters))
        return str(path)

    return write
