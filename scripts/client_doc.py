"""docs/reference/python.md, from the docstrings of the client and its records."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from typing import Any

import loramux
from loramux import Client, vectors
from loramux.connection import CredentialOptions
from scripts.pages import one_line, table

HEAD = """\
# The Python client

<!-- Written by scripts/client_doc.py from the docstrings of loramux: `make docs`. -->

Every public method of `loramux.Client`, its options, and the records that it returns. `pip install loramux` is
the client alone: gRPC, protobuf, Pydantic and PyYAML. `loramux.AsyncClient` has the same methods, with `await`,
or with `async for` where a method here returns a generator. A `Prompt` is text, token ids or messages; an
`Event` is Started, Delta or Finished.

```python
from loramux import Client, Delta

with Client("127.0.0.1:50052") as client:
    print(client.complete("support", [{"role": "user", "content": "My order is late."}]).text)
    print(client.complete("support", "The order as JSON:", json_schema={"type": "object"}).text)
    for event in client.generate("legal", "The party of the first part", max_tokens=64):
        if isinstance(event, Delta):
            print(event.text, end="", flush=True)
```

A stream that is left early is cancelled on the server. A failure is an exception of `loramux.faults` with a
reason (`ModelNotFound`, `QueueFull`, ...): [errors](errors.md). Several replicas, `dns:///NAME:PORT`, and what
the client does when one of them fails: [many machines](../guides/fleet.md#the-python-client).
"""
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
    parts = [HEAD, "## Client\n", _code(f"Client{_signature(Client)}"), *methods]
    parts += ["## Options\n", *map(_kind, OPTIONS), "## Records\n", *map(_kind, records)]
    return "\n".join(parts)


def _method(name: str, function: Callable[..., Any]) -> str:
    text = inspect.getdoc(function) or ""
    return f"### {name}\n\n{_code(name + _signature(function))}\n{_markdown(text)}\n"


def _signature(function: Callable[..., Any]) -> str:
    """Return a signature without self, with types as they are written."""
    signature = inspect.signature(function)
    rest = [each for each in signature.parameters.values() if each.name != "self"]
    words = str(signature.replace(parameters=rest))
    words = re.sub(r"LoraConfiguration\(.*?\)", "LoraConfiguration()", words)
    words = re.sub(r"= '([^']+)'", r'= "\1"', words).replace("'", "")
    return words.removesuffix(" -> None") if inspect.isclass(function) else words


def _code(text: str) -> str:
    return f"```python\n{text.strip()}\n```\n"


def _markdown(text: str) -> str:
    return re.sub(r"``(.+?)``", r"`\1`", text)


def _kind(kind: type) -> str:
    """Return a section of a class: its docstring, and a row per field or value."""
    rows = list(_fields(kind))
    text = _markdown(inspect.cleandoc(kind.__doc__ or ""))
    return f"### {kind.__name__}\n\n{text}\n" + (
        f"\n{table(('field', 'type', 'meaning'), rows)}" if rows else ""
    )


def _fields(kind: type) -> list[tuple[str, str, str]]:
    """Return the fields of a class in the order of its source, each with the string that follows it."""
    [tree] = ast.parse(inspect.cleandoc("\n" + inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)  # noqa: S101 - the source of a class
    rows = []
    for each, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        known = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        text = _markdown(one_line(str(after.value.value))) if known else ""  # type: ignore[union-attr]
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            rows.append((f"`{each.target.id}`", f"`{ast.unparse(each.annotation)}`", text))
        elif isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name):
            rows.append((f"`{each.targets[0].id}`", f"`{ast.unparse(each.value)}`", text))
    return rows
