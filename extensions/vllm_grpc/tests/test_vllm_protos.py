"""Our protos of vLLM's API have the same bytes on the wire as the original ones."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_tools import protoc

from loramux_vllm_grpc import engine_requests, inference_requests
from loramux_vllm_grpc.wire import common_pb2, engine_pb2, inference_pb2

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
    """All messages of a file that have fields here."""
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
