"""docs/reference/grpc.md, from the protos and their comments."""

from __future__ import annotations

import importlib.resources
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

from scripts.pages import one_line, table

PROTOS = Path(__file__).resolve().parent.parent / "protos"
HEAD = """\
# The gRPC API

<!-- Written by scripts/api_doc.py from protos/: `make docs`. -->

Both services also serve `grpc.health.v1.Health` and server reflection. The reasons in the tables of statuses
are explained in [errors.md](errors.md). Fields that are not set have protobuf's defaults unless their comment
says otherwise; *optional* fields tell unset from zero.
"""
# Numbers of descriptor.proto: where the comments of nested things are found.
MESSAGES, ENUMS, SERVICES = 4, 5, 6
FIELDS, NESTED, NESTED_ENUMS = 2, 3, 4
METHODS = VALUES = 2
Path_: TypeAlias = tuple[int, ...]
Comments: TypeAlias = Mapping[Path_, str]


def page() -> str:
    """Return the page."""
    return "\n".join([HEAD, *(part for file in _files() for part in _file(file))])


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
    for number, service in enumerate(file.service):
        yield from _service(file.package, service, comments, (SERVICES, number))
    for number, message in enumerate(file.message_type):
        yield from _message(file.package, message, comments, (MESSAGES, number), "")
    for number, enum in enumerate(file.enum_type):
        yield _enum(file.package, enum, comments, (ENUMS, number), "")


def _service(package: str, service: ServiceDescriptorProto, comments: Comments, at: Path_) -> Iterator[str]:
    yield f"## {package}.{service.name}\n\n{_text(comments.get(at, ''))}"
    for number, method in enumerate(service.method):
        asked, answered = (_link(kind, package) for kind in (method.input_type, method.output_type))
        stream = "a stream of " if method.server_streaming else ""
        said = _text(comments.get((*at, METHODS, number), ""))
        yield f"### {service.name}.{method.name}\n\nTakes {asked}, returns {stream}{answered}.\n\n{said}"


def _message(
    package: str, message: DescriptorProto, comments: Comments, at: Path_, outer: str
) -> Iterator[str]:
    if message.options.map_entry:
        return
    name = f"{outer}{message.name}"
    rows = [
        (
            f"`{field.name}`",
            _type(field, message, package),
            str(field.number),
            _meaning(field, message, comments.get((*at, FIELDS, index), "")),
        )
        for index, field in enumerate(message.field)
    ]
    head = ("field", "type", "number", "meaning")
    fields = table(head, rows) if rows else "No fields.\n"
    yield _heading(package, name) + _text(comments.get(at, "")) + fields
    for number, inner in enumerate(message.nested_type):
        yield from _message(package, inner, comments, (*at, NESTED, number), f"{name}.")
    for number, enum in enumerate(message.enum_type):
        yield _enum(package, enum, comments, (*at, NESTED_ENUMS, number), f"{name}.")


def _enum(package: str, enum: EnumDescriptorProto, comments: Comments, at: Path_, outer: str) -> str:
    rows = [
        (f"`{value.name}`", str(value.number), one_line(comments.get((*at, VALUES, index), "")))
        for index, value in enumerate(enum.value)
    ]
    said = _text(comments.get(at, ""))
    return _heading(package, f"{outer}{enum.name}") + said + table(("value", "number", "meaning"), rows)


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
    """Return a comment as paragraphs; a paragraph of statuses as a table."""
    parts = []
    for paragraph in comment.strip("\n").split("\n\n"):
        lines = [line.removeprefix(" ") for line in paragraph.splitlines() if line.strip()]
        if not lines:
            continue
        statuses = _statuses(lines)
        parts.append(table(("status", "reason and cure"), statuses) if statuses else f"{one_line(paragraph)}\n")
    return "\n".join(parts) + "\n" if parts else ""


def _statuses(lines: list[str]) -> list[tuple[str, str]]:
    """Return (status, text) of ``NOT_FOUND   REASON: what to do``; none of another paragraph."""
    rows: list[list[Any]] = []
    for line in lines:
        found = re.fullmatch(r"([A-Z][A-Z_]{4,})\s{2,}(.*)", line)
        if found:
            rows.append([found[1], found[2]])
        elif rows:
            rows[-1][1] += f" {line.strip()}"
        else:
            return []
    return [(f"`{status}`", text) for status, text in rows]
