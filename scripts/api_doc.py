"""docs/reference/grpc.md, from the protos and their comments."""

from __future__ import annotations

import importlib.resources
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

from loramux_shared.faults import FAULTS
from scripts.pages import entries_of, one_line

PROTOS = Path(__file__).resolve().parent.parent / "protos"
HEAD = """\
# The gRPC API

<!-- Written by scripts/api_doc.py from protos/: `make docs`. -->

Every rpc with its fields and the reasons of its failures. The protos of the
[builder](../../protos/loramux/builder/v1/builder.proto) and the [inference
service](../../protos/loramux/inference/v1/inference.proto) add field numbers, when each reason occurs, and
what happens when calls race or repeat; [errors](errors.md) has the status, the meaning and the cure of
a reason. Both services also serve `grpc.health.v1.Health` and server reflection. A
field that is not set has protobuf's default unless its comment says otherwise; *optional* fields tell unset
from zero.

Every rpc can also fail with SHUTTING_DOWN, REQUEST_INVALID or CLIENT_STALLED and, on a server
[with keys](../guides/access.md#keys), UNAUTHENTICATED or PERMISSION_DENIED. A key is the metadata
`authorization: Bearer KEY`, with the scope `build` for the builder, `infer` for answers, and `admin` for
adapters.
"""
EVERYWHERE = {"SHUTTING_DOWN", "REQUEST_INVALID", "CLIENT_STALLED", "UNAUTHENTICATED", "PERMISSION_DENIED"}
"""Reasons of every rpc, which HEAD names."""
# Numbers of descriptor.proto: where the comments of nested things are found.
MESSAGES, ENUMS, SERVICES = 4, 5, 6
FIELDS, NESTED, NESTED_ENUMS = 2, 3, 4
METHODS = VALUES = 2
Path_: TypeAlias = tuple[int, ...]
Comments: TypeAlias = Mapping[Path_, str]
Messages: TypeAlias = Mapping[str, tuple[DescriptorProto, Path_]]


def _keys(section: str) -> str:
    return f"Fields are [keys of the deployment file](deployment-file.md#{section}).\n"


def _values(section: str, key: str) -> str:
    return f"Values of [`{key}`](deployment-file.md#{section}); unspecified is the default.\n"


EXPLAINED_ELSEWHERE = {
    "DeploymentSpec": """\
Fields are [keys of the deployment file](deployment-file.md); 0 and empty mean the key's default. Other names:
`base` is `checkpoint_repository`, `adapters` are `lora_adapters`, `lora_dtype` is `dtype`, `hide_base` is
`serve_base: false`, `default_limits` and `model_limits` are `limits`.
""",
    "Limits": _keys("limits"),
    "Repository": _keys("repository"),
    "Resolve": _keys("resolve"),
    "Speculator": _keys("speculator"),
    "SourceKind": "A kind of [source](sources.md).\n",
    "Dtype": _values("loraconfiguration", "dtype"),
    "Merge": _values("runtime", "merge"),
    "Quantization": _values("runtime", "quantization"),
}
"""Messages and enums that another page explains, with what this page says in place of their comments."""
STATUS = re.compile(r"^\s*[A-Z][A-Z_]{4,}\s{2,}", re.MULTILINE)
"""The beginning of a paragraph of statuses: ``NOT_FOUND   REASON: what to do``."""


def page() -> str:
    """Return the page."""
    return "\n".join([HEAD, *(part.rstrip() + "\n" for file in _files() for part in _file(file))])


def _files() -> list[FileDescriptorProto]:
    """Return our files with their comments."""
    names = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("loramux/*/v1/*.proto"))
    include = importlib.resources.files("grpc_tools") / "_proto"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "set"
        flags = [f"-I{PROTOS}", f"-I{include}", "--include_source_info", f"--descriptor_set_out={target}"]
        if protoc.main(["protoc", *flags, *names]):
            raise SystemExit("protoc failed")
        return list(FileDescriptorSet.FromString(target.read_bytes()).file)


def _file(file: FileDescriptorProto) -> Iterator[str]:
    places = file.source_code_info.location
    comments = {tuple(place.path): place.leading_comments + place.trailing_comments for place in places}
    messages = {
        f".{file.package}.{each.name}": (each, (MESSAGES, at)) for at, each in enumerate(file.message_type)
    }
    for number, service in enumerate(file.service):
        yield from _service(file.package, service, comments, (SERVICES, number), messages)
    ends = {
        kind
        for service in file.service
        for each in service.method
        for kind in (each.input_type, each.output_type)
    }
    for name, (message, at) in messages.items():
        if name not in ends:
            yield from _message(file.package, message, comments, at, "")
    for number, enum in enumerate(file.enum_type):
        yield _enum(file.package, enum, comments, (ENUMS, number), "")


def _service(
    package: str, service: ServiceDescriptorProto, comments: Comments, at: Path_, messages: Messages
) -> Iterator[str]:
    """Return a section for a service, and one for each method with the fields that it takes and returns."""
    about = _text(comments.get(at, "").partition("Every error carries")[0])
    yield f"## {package}.{service.name}\n\n{about}"
    for number, method in enumerate(service.method):
        comment = comments.get((*at, METHODS, number), "")
        stream = "Takes a stream of" if method.client_streaming else "Takes"
        takes = _fields(stream, package, *messages[method.input_type], comments)
        returns = _fields(
            "Streams" if method.server_streaming else "Returns",
            package,
            *messages[method.output_type],
            comments,
        )
        reasons = _reasons(comment)
        fails = f"Fails with {', '.join(reasons)}.\n" if reasons else ""
        about = _text(comment.strip("\n").partition("\n\n")[0])
        yield f"### {service.name}.{method.name}\n\n{about}{takes}\n{returns}\n{fails}"


def _reasons(comment: str) -> list[str]:
    """Return the reasons that the statuses of a comment name, each once, without those of every rpc."""
    statuses = "\n".join(each for each in comment.split("\n\n") if STATUS.match(each))
    named = re.findall(r"([A-Z][A-Z_]+)[:,]", re.sub(STATUS, "", statuses))
    return [reason for reason in dict.fromkeys(named) if reason in FAULTS.keys() - EVERYWHERE]


def _fields(verb: str, package: str, message: DescriptorProto, at: Path_, comments: Comments) -> str:
    """Return what a method takes or returns: a line, or a list where a field has a meaning."""
    listed = _list(package, message, comments, at)
    if listed.count("\n") > 1 or ": " in listed:
        return f"{verb}\n\n{listed}"
    return f"{verb} {listed.removeprefix('- ').strip() or 'nothing'}.\n"


def _list(package: str, message: DescriptorProto, comments: Comments, at: Path_) -> str:
    """Return an entry for each field that has a meaning, and one for all others."""
    entries = []
    for index, field in enumerate(message.field):
        meaning = _meaning(field, message, comments.get((*at, FIELDS, index), ""))
        known = message.name in EXPLAINED_ELSEWHERE
        entries.append((f"`{field.name}` {_type(field, message, package)}", "" if known else meaning))
    return entries_of(entries)


def _message(
    package: str, message: DescriptorProto, comments: Comments, at: Path_, outer: str
) -> Iterator[str]:
    if message.options.map_entry:
        return
    name = f"{outer}{message.name}"
    about = _about(name, comments.get(at, ""))
    yield _heading(package, name) + about + (_list(package, message, comments, at) or "Empty.\n")
    for number, inner in enumerate(message.nested_type):
        yield from _message(package, inner, comments, (*at, NESTED, number), f"{name}.")
    for number, enum in enumerate(message.enum_type):
        yield _enum(package, enum, comments, (*at, NESTED_ENUMS, number), f"{name}.")


def _enum(package: str, enum: EnumDescriptorProto, comments: Comments, at: Path_, outer: str) -> str:
    """Return the values of an enum: a line, or a list where a value has a meaning."""
    known = enum.name in EXPLAINED_ELSEWHERE
    entries = [
        (f"`{value.name}`", "" if known else one_line(comments.get((*at, VALUES, index), "")))
        for index, value in enumerate(enum.value)
    ]
    name = f"{outer}{enum.name}"
    return _heading(package, name) + _about(name, comments.get(at, "")) + entries_of(entries)


def _about(name: str, comment: str) -> str:
    """Return what the page says of a message or an enum: its comment, or the link to its page."""
    return f"{EXPLAINED_ELSEWHERE[name]}\n" if name in EXPLAINED_ELSEWHERE else _text(comment)


def _heading(package: str, name: str) -> str:
    return f"### {package.split('.')[1]}.{name}\n\n"


def _type(field: FieldDescriptorProto, message: DescriptorProto, package: str) -> str:
    entry = next((each for each in message.nested_type if field.type_name.endswith(f".{each.name}")), None)
    if entry is not None and entry.options.map_entry:
        key, value = (_type(part, entry, package) for part in entry.field)
        return f"map of {key} to {value}"
    plain = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    name = _link(field.type_name, package) if field.type_name else plain
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _link(full: str, package: str) -> str:
    """Return a message's or enum's name, as a link where it stands on this page."""
    bare = full.removeprefix(".")
    if not bare.startswith("loramux."):
        return f"`{bare}`"
    _, service, _, name = bare.split(".", 3)
    anchor = re.sub(r"[^a-z0-9_-]", "", f"{service}{name}".lower())
    return f"[{name if bare.startswith(package) else f'{service}.{name}'}](#{anchor})"


def _meaning(field: FieldDescriptorProto, message: DescriptorProto, comment: str) -> str:
    parts = [one_line(comment)]
    if field.HasField("oneof_index") and not field.proto3_optional:
        parts.insert(0, f"*One of `{message.oneof_decl[field.oneof_index].name}`.*")
    return " ".join(filter(None, parts))


def _text(comment: str) -> str:
    """Return a comment as paragraphs, without those of statuses."""
    paragraphs = [each for each in comment.strip("\n").split("\n\n") if each.strip() and not STATUS.match(each)]
    return "".join(f"{one_line(each)}\n\n" for each in paragraphs)
