"""The typed client against scripted services on loopback, and with nothing but its own dependencies."""

import asyncio
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hatchling.builders.wheel import WheelBuilder

import loramux
from inference_service.engine.kernels.cpu import compiling
from loramux import AsyncClient, Client, Delta, DeploymentState, FinishReason, Stage, faults, load_deployment
from loramux.builder.v1 import builder_pb2
from loramux.inference.v1 import inference_pb2
from loramux.mapping import completion_of, deployment_of, event_of
from loramux.requests import generate_request
from loramux.vectors import ScoreOptions, classify_request, embed_request
from loramux_shared.deployment import Deployment
from tests.support.cases import cases
from tests.support.root import ROOT
from tests.support.services.fake_grpc import DIGEST, WORDS, Fakes
from tests.support.waiting import BOUND_S, until


@pytest.fixture
def client(fakes: Fakes) -> Iterator[Client]:
    with Client(fakes.inference_address, fakes.builder_address, timeout_s=BOUND_S) as made:
        yield made


@pytest.fixture
async def aio(fakes: Fakes) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(fakes.inference_address, fakes.builder_address, timeout_s=BOUND_S) as made:
        yield made


@pytest.fixture
def deploy(deployment: Callable[..., str]) -> Callable[..., Deployment]:
    return lambda *names: load_deployment(Path(deployment(*names))).deployment


def test_models_are_records(client: Client) -> None:
    """A model is a record of typed fields; a time that is not known is None."""
    base, lora1, _ = client.models()
    assert base.is_base
    assert base.max_seq_len == 2048
    assert (lora1.parent, lora1.digest, lora1.ranks, lora1.modules) == ("base", DIGEST, (8,), ("attn_q",))
    assert lora1.load_time is None


def test_options_reach_the_request(client: Client, fakes: Fakes) -> None:
    """Options that are given are set, those that are not stay unset, and a lone stop text is one stop text."""
    options = {"max_tokens": 9, "temperature": 0.0, "stop": "END", "stop_token_ids": [2], "logprobs": 0}
    client.complete("base", "hi", **options, priority=-1)
    request = fakes.inference.requests[-1]
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p")
    assert request.sampling.HasField("logprobs")
    assert (list(request.sampling.stop), request.priority, request.sampling.max_tokens) == (["END"], -1, 9)


def test_values_that_fit_no_field_are_all_named() -> None:
    """A request with values out of range is refused before it is sent, each value with its name."""
    with pytest.raises(faults.RequestInvalid) as caught:
        generate_request(
            "m",
            [1, -5],
            {"max_tokens": -1, "seed": "x", "priority": 2**40, "adapters": "a*0.5"},  # type: ignore[typeddict-item]
        )
    wrong = {"priority", "max_tokens", "seed", "prompt", "adapters"}
    assert {item.where for item in caught.value.findings} == wrong


@pytest.mark.parametrize(
    ("call", "fields", "where"), cases(__file__, "test_calls_with_values_that_fit_no_field_are_refused")
)
def test_calls_with_values_that_fit_no_field_are_refused(
    client: Client, call: str, fields: dict[str, Any], where: list[str]
) -> None:
    """A number beyond its field, or text that is no Unicode, is named before a call is made."""
    with pytest.raises(faults.RequestInvalid) as caught:
        list(getattr(client, call)(**fields))
    assert [item.where for item in caught.value.findings] == where


WRONG: dict[str, tuple[Any, str, str]] = cases(__file__, "WRONG")
"""A value that does not fit, by option, with what is said to be expected and found."""


@pytest.mark.parametrize("name", WRONG)
def test_an_option_that_does_not_fit_is_refused_with_what_would(name: str) -> None:
    """A wrong option is refused with the expected value, in the same words for answers, vectors and scores."""
    value, expected, found = WRONG[name]
    requests: list[tuple[Any, Any]] = [(generate_request, "hi")]
    if name in ScoreOptions.__annotations__:
        requests += [(embed_request, ["hi"]), (classify_request, ["hi"])]
    for request, prompt in requests:
        with pytest.raises(faults.RequestInvalid) as caught:
            request("m", prompt, {name: value})
        [reported] = caught.value.findings
        assert (reported.expected, reported.found, reported.fix) == (expected, found, "")
        assert reported.where.replace("constraint", "regex") == name


def test_unknown_options_are_a_type_error(client: Client) -> None:
    """A misspelt option is a TypeError, and nothing is sent."""
    with pytest.raises(TypeError, match="max_token"):
        client.generate("base", "hi", max_token=3)  # type: ignore[call-arg]


def test_an_abandoned_stream_is_cancelled(client: Client, fakes: Fakes) -> None:
    """Leaving the loop frees the sequence on the server."""
    fakes.inference.cancelled.clear()
    for event in client.generate("base", "wait"):
        if isinstance(event, Delta):
            break
    assert fakes.inference.cancelled.wait(BOUND_S)


async def test_closing_ends_open_async_streams(fakes: Fakes) -> None:
    """A stream fails with a named fault, and not a cancellation, when its client is closed."""
    client = AsyncClient(fakes.inference_address)
    count = len(fakes.inference.requests)
    task = asyncio.create_task(client.complete("base", "wait"))
    await until(lambda: len(fakes.inference.requests) > count, "the request")
    await client.close()
    with pytest.raises(faults.CallFailed, match="closed"):
        await task


async def test_listing_turns_the_pages(client: Client, aio: AsyncClient, fakes: Fakes, deploy: Any) -> None:
    """The sync and asyncio clients read all pages."""
    for name in ("page-a", "page-b"):
        await aio.build(deploy(name))
    fakes.builder.pages.clear()
    names = [info.name for info in await aio.deployments()]
    assert {"page-a", "page-b"} <= set(names)
    assert len(fakes.builder.pages) == len(names)
    assert [info.name for info in await asyncio.to_thread(client.deployments)] == names
    assert (await aio.deployment("page-a")).name == "page-a"


@pytest.mark.parametrize(
    ("records", "numbers", "prefix"),
    [
        (FinishReason, inference_pb2.FinishReason, "FINISH_REASON_"),
        (DeploymentState, builder_pb2.Deployment.State, "STATE_"),
        (Stage, builder_pb2.AdapterBuild.Stage, "STAGE_"),
    ],
)
def test_enums_follow_the_proto(records: Any, numbers: Any, prefix: str) -> None:
    """The client's enums have the names and the order of the proto's."""
    assert [prefix + member.name for member in records] == numbers.keys()
    assert list(numbers.values()) == list(range(len(records)))


def test_newer_servers_are_understood() -> None:
    """Events and enum numbers that this client does not know are no failure."""
    assert event_of(inference_pb2.GenerateResponse()) is None
    assert deployment_of(builder_pb2.Deployment(state=99)).state is DeploymentState.UNSPECIFIED  # type: ignore[arg-type]


def test_a_stream_without_an_end_is_a_fault() -> None:
    """A stream that ends without its last message is no answer."""
    with pytest.raises(faults.InternalFault):
        completion_of([Delta("half", (1,))])


def test_the_package_exports_what_it_lists() -> None:
    """Every name of ``loramux`` can be imported, and others are an AttributeError."""
    for name in loramux.__all__:
        assert getattr(loramux, name)
    with pytest.raises(AttributeError):
        loramux.nothing  # noqa: B018


OLDEST = ROOT / ".venv/oldest"
"""Filled by `make`, from support/oldest.txt."""
ASK = """
import json, sys
import google.protobuf, grpc, pathlib
import loramux
for name in loramux.__all__:
    getattr(loramux, name)
with loramux.Client(inference=sys.argv[1]) as client:
    events = list(client.generate("lora1", "hello"))
text = "".join(event.text for event in events if isinstance(event, loramux.Delta))
adapters = len(loramux.load_deployment(pathlib.Path(sys.argv[2])).deployment.build.lora_adapters)
print(json.dumps([google.protobuf.__version__, grpc.__version__, text, adapters]))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A path with the wheel and the oldest dependencies; run with -S, which leaves this environment out."""
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patched:  # a client needs no compiled operations
        patched.setattr(compiling, "compile_beforehand", lambda *_: [])
        [built] = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return f"{built}:{OLDEST}"


def _run(path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, env={"PYTHONPATH": path}, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="there are no wheels of the oldest packages")
def test_a_stream_beside_protobuf_6(alone: str, fakes: Fakes, deployment: Callable[..., str]) -> None:
    """A client's imports are installed, an answer streams, and a deployment file is read."""
    file = deployment("support", "one")
    done = _run(alone, "-c", ASK, fakes.inference_address, file)
    assert done.returncode == 0, done.stderr
    protobuf, grpc, text, adapters = json.loads(done.stdout)
    assert (protobuf, grpc) == ("6.30.0", "1.72.1")
    assert text.startswith("".join(WORDS))
    assert adapters == 1


def test_the_command_line_says_which_extra_it_needs(alone: str) -> None:
    """The command line is not part of a client: its absence is a sentence, and no traceback."""
    done = _run(alone, "-c", "from loramux.cli.entry import main; main()")
    assert done.returncode == 1
    assert re.fullmatch(r"loramux: the command line needs \w+, .*pip install 'loramux\[cli\]'\n", done.stderr)


def test_the_oldest_are_those_that_the_project_names() -> None:
    """Each dependency of a client is tried at its lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = {part[0]: part[1] for each in project["dependencies"] if (part := re.split(">=|,", each))}
    lines = (ROOT / "tests/support/oldest.txt").read_text().splitlines()
    tried = dict(re.split("==|;", line)[:2] for line in lines if not line.startswith("#"))
    assert tried.keys() == floors.keys()
    assert all(tried[name].startswith(floor) for name, floor in floors.items())
