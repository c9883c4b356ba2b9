"""docs/reference/python.md, from the docstrings of the client and its records."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from enum import Enum
from typing import Any

from google.protobuf.message import Message

import loramux
from loramux import Client, vectors
from loramux.builder.v1 import builder_pb2
from loramux.connection import CredentialOptions
from loramux.inference.v1 import adapters_pb2, inference_pb2
from scripts.pages import entries_of, fields_of, one_line

HEAD = """\
# The Python client

<!-- Written by scripts/client_doc.py from the docstrings of loramux: `make docs`. -->

Every public method of `loramux.Client`, its options and the records that it returns. `pip install loramux`
installs the client alone. `loramux.AsyncClient` has the same methods, with `await`, or with `async for` where
`Client` returns a generator. A `Prompt` is text, token ids or messages; an `Event` is Started, Delta or
Finished.

```python
from loramux import Client, Delta

with Client("127.0.0.1:50052") as client:
    print(client.complete("support", [{"role": "user", "content": "My order is late."}]).text)
    print(client.complete("support", "The order as JSON:", json_schema={"type": "object"}).text)
    for event in client.generate("legal", "The party of the first part", max_tokens=64):
        if isinstance(event, Delta):
            print(event.text, end="", flush=True)
```

Leaving a stream early cancels it on the server. A failure raises an exception of `loramux.faults` with a reason
(`ModelNotFound`, `QueueFull`, ...): [errors](errors.md). Several replicas and retries:
[many machines](../guides/fleet.md#the-python-client).
"""
OPTIONS_HEAD = """\
Keywords of the methods above; None is an option that is not set. Every call takes `timeout_s`. What
GenerateOptions explains means the same elsewhere; its other options are fields of
[Generate](grpc.md#inferenceservicegenerate), of its [sampling](grpc.md#inferencesamplingparams) and of its
[messages](grpc.md#inferencemessages).
"""
RECORDS_HEAD = """\
A record with a link has the fields of that message, by the same names; other fields are listed. The value of an
enum is its name in lower case.
"""
MESSAGES: dict[str, type[Message]] = {
    "AdapterChange": builder_pb2.AdapterChange,
    "AdapterInfo": builder_pb2.AdapterBuild,
    "AdapterReport": builder_pb2.AdapterReport,
    "AdapterStatus": adapters_pb2.AdapterState,
    "Delta": inference_pb2.Delta,
    "DeploymentInfo": builder_pb2.Deployment,
    "Finished": inference_pb2.Finished,
    "GenerationInfo": builder_pb2.Generation,
    "ModelInfo": inference_pb2.Model,
    "ReplicaStatus": adapters_pb2.ReplicaState,
    "RowReport": builder_pb2.AdapterRow,
    "Started": inference_pb2.Started,
    "TokenLogprobs": inference_pb2.TokenLogprobs,
    "Usage": inference_pb2.Usage,
}
"""Records whose fields have the meaning of those of a message, which docs/reference/grpc.md explains."""
PARTS = (inference_pb2.SamplingParams, inference_pb2.GenerateRequest, inference_pb2.Messages)
SAME_OPTIONS = {name for part in PARTS for name in part.DESCRIPTOR.fields_by_name} - {
    "adapters",
    "chat_template_kwargs",
    "tools",
}
"""Options of an answer that docs/reference/grpc.md explains as well: all but those of another type."""
OPTIONS = (loramux.GenerateOptions, vectors.EmbedOptions, vectors.ScoreOptions, CredentialOptions)


def page() -> str:
    """Return the whole page."""
    names = [name for name in loramux.__all__ if inspect.isclass(getattr(loramux, name))]
    left = {*OPTIONS, Client, loramux.AsyncClient}
    records = [kind for name in names if (kind := getattr(loramux, name)) not in left]
    methods = [
        _method(name, function)
        for name, function in inspect.getmembers(Client, inspect.isfunction)
        if not name.startswith("_")
    ]
    parts = [HEAD, "## Client\n", f"`Client{_signature(Client)}`\n", "".join(methods)]
    parts += [
        "## Options\n",
        OPTIONS_HEAD,
        *map(_kind, OPTIONS),
        "## Records\n",
        RECORDS_HEAD,
        "".join(f"- `{kind.__name__}`: {_about(kind)}\n" for kind in records if not _listed(kind)),
        *(_kind(kind) for kind in records if _listed(kind)),
    ]
    return "\n".join(parts)


def _method(name: str, function: Callable[..., Any]) -> str:
    text = inspect.getdoc(function) or ""
    return f"- `{name}{_signature(function)}`: {_markdown(one_line(text))}\n"


def _signature(function: Callable[..., Any]) -> str:
    """Return a signature without self, with types as they are written."""
    signature = inspect.signature(function)
    rest = [each for each in signature.parameters.values() if each.name != "self"]
    words = str(signature.replace(parameters=rest))
    words = re.sub(r"LoraConfiguration\((?:[^()]|\([^()]*\))*\)", "LoraConfiguration()", words)
    words = words.replace(", timeout_s: 'float | None' = None", "").replace("*, **", "**").replace("(*)", "()")
    words = re.sub(r"Unpack\[(\w+)\]", r"\1", words)
    words = re.sub(r"= '([^']+)'", r'= "\1"', words).replace("'", "")
    return words.removesuffix(" -> None") if inspect.isclass(function) else words


def _markdown(text: str) -> str:
    return re.sub(r"``(.+?)``", r"`\1`", text)


def _kind(kind: type) -> str:
    """Return a section of a class: its docstring, an entry per field with a meaning, one for all others."""
    return "\n".join(filter(None, (f"### {kind.__name__}\n\n{_about(kind)}\n", _listed(kind))))


def _about(kind: type) -> str:
    """Return the docstring of a class, and a link to the message that it is made of."""
    text = _markdown(inspect.cleandoc(kind.__doc__ or ""))
    if kind.__name__ not in MESSAGES:
        return text
    message = MESSAGES[kind.__name__].DESCRIPTOR
    service = message.full_name.split(".")[1]
    return f"{text.removesuffix('.')}: [{message.name}](grpc.md#{service}{message.name.lower()})."


def _listed(kind: type) -> str:
    """Return the fields of a class that its message does not explain."""
    rows = [row for row in _fields(kind) if row[0] != "UNSPECIFIED"]
    known: set[str] = set()
    if kind in OPTIONS:
        rows = [(name, named.removesuffix(" | None"), text) for name, named, text in rows]
        known = SAME_OPTIONS if kind is OPTIONS[0] else {row[0] for row in _fields(OPTIONS[0])}
    elif kind.__name__ in MESSAGES:
        explained = MESSAGES[kind.__name__].DESCRIPTOR.fields_by_name
        rows = [row for row in rows if row[0] not in explained]
    return entries_of(
        (f"`{name}`", "") if name in known or issubclass(kind, Enum) else (f"`{name}{named}`", meaning)
        for name, named, meaning in rows
    )


def _fields(kind: type) -> list[tuple[str, str, str]]:
    """Return name, type or value, and meaning of each field of a class, in the order of its source."""
    rows = []
    for each, meaning in fields_of(kind):
        text = _markdown(one_line(meaning))
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            rows.append((each.target.id, f": {ast.unparse(each.annotation)}", text))
        elif isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name):
            rows.append((each.targets[0].id, f" = {ast.unparse(each.value)}", text))
    return rows
