"""vLLM's services: keys, addresses of one model, and protos with the same bytes on the wire."""

import importlib.resources
from contextlib import suppress
from pathlib import Path
from typing import cast

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_tools import protoc

from inference_service import __main__ as process_of
from inference_service.serving.engine_thread import EngineThread
from inference_service.serving.service import GenerationService
from inference_service.serving.terms import ServingLimits
from inference_service.text.text import Text
from loramux_shared import extensions
from loramux_shared.access.guard import Guard
from loramux_shared.access.keys import ACCESS, Access, Scope
from loramux_shared.faults import SettingsInvalid
from loramux_shared.rpc.server import CORE, RpcServer
from loramux_shared.settings import InferenceSettings
from loramux_vllm_grpc import engine, engine_requests, inference, inference_requests
from loramux_vllm_grpc.running import Running
from loramux_vllm_grpc.services import VllmServices
from loramux_vllm_grpc.wire import common_pb2, engine_pb2, inference_pb2
from tests.support.access import keyring
from tests.support.operated import Operated, operated
from tests.support.silent import SilentEngine, silent_service
from tests.support.tiny import VOCAB

FILES = {"vllm_engine.proto": engine_pb2, "common.proto": common_pb2}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> DescriptorPool:
    """The files of smg-grpc-proto, in a pool of their own: its modules would want the names that ours have."""
    folder = importlib.resources.files("smg_grpc_proto") / "proto"
    target: Path = tmp_path_factory.mktemp("protos") / "set"
    assert not protoc.main(["protoc", f"-I{folder}", f"--descriptor_set_out={target}", *FILES])
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString(target.read_bytes()).file:
        pool.Add(file)
    return pool


def shape(field: FieldDescriptor) -> tuple[object, ...]:
    """Return the parts of a field that are on the wire, or change it."""
    return field.number, field.name, field.type, field.is_repeated, field.has_presence


def messages_of(file: FileDescriptor) -> list[Descriptor]:
    return [message for message in file.message_types_by_name.values() if message.fields]


@pytest.mark.parametrize("name", FILES)
def test_fields_and_methods_are_theirs(theirs: DescriptorPool, name: str) -> None:
    """Every field that is declared here has the number, type and presence that it has there."""
    ours = FILES[name].DESCRIPTOR
    assert ours.package == theirs.FindFileByName(name).package
    for message in messages_of(ours):
        real = {shape(field) for field in theirs.FindMessageTypeByName(message.full_name).fields}
        assert {shape(field) for field in message.fields} <= real, message.full_name
    for service in ours.services_by_name.values():
        real = {
            (method.name, method.input_type.full_name, method.output_type.full_name, method.server_streaming)
            for method in theirs.FindServiceByName(service.full_name).methods
        }
        assert real == {
            (method.name, method.input_type.full_name, method.output_type.full_name, method.server_streaming)
            for method in service.methods
        }


REQUESTS = (
    "GenerateRequest",
    "SamplingParams",
    "TokenizedInput",
    "ChoiceConstraint",
    "EmbedRequest",
    "AbortRequest",
    "GetLoadsRequest",
)


@pytest.mark.parametrize("name", REQUESTS)
def test_whole_requests_are_known(theirs: DescriptorPool, name: str) -> None:
    """Every field of vLLM's requests is served or refused by name."""
    ours = engine_pb2.DESCRIPTOR.message_types_by_name[name]
    real = theirs.FindMessageTypeByName(ours.full_name)
    assert set(map(shape, real.fields)) == set(map(shape, ours.fields))


def test_every_field_is_served_or_refused() -> None:
    """A field is read by its name, refused by it, or in the list of those without effect."""
    for module, file in ((engine_requests, engine_pb2), (inference_requests, inference_pb2)):
        source = Path(module.__file__).read_text(encoding="utf-8")
        refused = {part for name in module.UNSUPPORTED for part in name.split(".")}
        for message in messages_of(file.DESCRIPTOR):
            if not message.name.startswith(
                ("Generate", "Sampling", "Random", "Decoding", "Stopping", "KVCache")
            ):
                continue
            if message.name.endswith(("Response", "Chunk", "Complete")):
                continue
            for field in message.fields:
                known = field.name in refused | module.WITHOUT_EFFECT or f'"{field.name}"' in source
                structure = field.containing_oneof is not None and field.containing_oneof.name in (
                    "constraint", "structured_output",
                )  # fmt: skip
                flag = field.name == "stream"  # by who answers
                assert known or structure or flag or f".{field.name}" in source, field.full_name


@pytest.fixture
def replica() -> Operated:
    """Two adapters and a builder."""
    return operated()


@pytest.fixture
def engine_of_all(tmp_path: Path) -> SilentEngine:
    """The engine of the service, without computation."""
    return cast(SilentEngine, silent_service(tmp_path).engine)


@pytest.fixture
def services(replica: Operated, engine_of_all: SilentEngine, tmp_path: Path) -> VllmServices:
    text, limits = Text.load(tmp_path, VOCAB), ServingLimits(64, frozenset({2}))
    service = GenerationService(replica.names, text, cast(EngineThread, engine_of_all), limits)
    return VllmServices(service, replica.manager)


OPEN = {"HealthCheck"}
METRICS = {"GetLoads"}
INFER = {
    "Generate", "GenerateStream", "Embed", "Abort", "GetModelInfo", "GetServerInfo", "GetTokenizer",
    "SubscribeKvEvents",
}  # fmt: skip


async def test_keys_open_what_they_are_for(services: VllmServices) -> None:
    """Health needs none, loads want metrics, answers want infer, and everything else wants admin."""
    keys, ring = keyring("infer", "metrics", "admin")
    server = RpcServer(
        "127.0.0.1:0", services.of_all_models(lambda: True), Guard(ring), rules=CORE + services.rules
    )
    async with grpc.aio.insecure_channel(await server.start()) as channel:
        for api in (engine, inference):
            for method in api.pb.DESCRIPTOR.services_by_name[api.SERVICE_NAME.rpartition(".")[2]].methods:
                needed = (
                    "" if method.name in OPEN else "metrics" if method.name in METRICS
                    else "infer" if method.name in INFER else "admin"
                )  # fmt: skip
                for scope in ("", "infer", "metrics"):
                    metadata = [("authorization", f"Bearer {keys[scope]}")] if scope else []
                    call = channel.unary_stream(f"/{api.SERVICE_NAME}/{method.name}")(b"", metadata=metadata)
                    with suppress(grpc.aio.AioRpcError):
                        await call.read()
                    denied = (await call.code()).name in ("UNAUTHENTICATED", "PERMISSION_DENIED")
                    assert denied == (needed not in ("", scope)), (method.full_name, scope)
    await server.drain(1)


def test_nobody_ends_the_requests_of_another_key() -> None:
    """Ids are those of a caller; several may have the same."""
    running = Running()
    with running.call("x") as mine, running.call("x") as again:
        token = ACCESS.set(Access("other", frozenset({Scope.INFER})))
        with running.call("x") as theirs:
            running.abort(["x", "y"])
            assert (mine.aborted, again.aborted, theirs.aborted) == (False, False, True)
        ACCESS.reset(token)
        running.abort(["x"])
        assert mine.aborted
        assert again.aborted
        assert len(running) == 2
    assert not len(running)


def test_without_this_extension_there_are_no_addresses_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start is refused before the load, and names the missing package."""
    settings = InferenceSettings(deployment="any", model_ports=("wide=127.0.0.1:0",))
    process_of.require_services_of_models(settings)
    monkeypatch.setattr(extensions, "find_spec", lambda _: None)
    with pytest.raises(SettingsInvalid, match="LORAMUX_MODEL_PORTS is set: expected an extension"):
        process_of.require_services_of_models(settings)
    process_of.require_services_of_models(InferenceSettings(deployment="any"))
