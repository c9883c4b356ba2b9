"""``python -m tests.golden.openapi.write``: write the recorded OpenAPI document, a line for each field."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from inference_service.api.http.app import ENDPOINTS
from inference_service.api.http.openapi.document import ServerFacts, document

RECORDED: Final = Path(__file__).with_name("openapi.txt")
MIN_SHARED_CHARACTERS: Final = 40
"""A field of as many characters is written once, in the first schema that has it."""
JSON_TYPES: Final[dict[type, str]] = {str: "string", int: "integer", bool: "boolean"}


def recorded() -> str:
    """Return the document of a server with all kinds of models; what it shares by a name stands at its end."""
    found = json.loads(json.dumps(document(ENDPOINTS, ServerFacts("base", "scorer", "classifier"))))
    shared: dict[str, Any] = {}
    paths, components = found.pop("paths"), found.pop("components")
    lines = [f"{key}: {json.dumps(value)}" for key, value in found.items()]
    for path, methods in paths.items():
        for method, operation in methods.items():
            lines += [
                "",
                f"{method.upper()} {path}: {operation.pop('summary')}",
                *_operation(operation, shared),
            ]
    lines += ["", *(f"{name}: {text}" for name, text in shared.items())]
    fields: dict[str, str] = {}
    for name, schema in components.pop("schemas").items():
        lines += ["", *_component(name, schema, fields)]
    return "\n".join([*lines, "", *(f"{key}: {json.dumps(value)}" for key, value in components.items()), ""])


def _operation(operation: dict[str, Any], shared: dict[str, Any]) -> Iterator[str]:
    """Yield an operation: its parameters, examples of its body, and its answers, by what they contain."""
    name = operation["operationId"]
    parameters = operation.pop("parameters", [])
    if parameters:
        known = [_share(shared, f"parameter {part['name']}", _parameter(part), name) for part in parameters]
        yield f"  parameters {', '.join(each.removeprefix('parameter ') for each in known)}"
    for kind, content in operation.get("requestBody", {}).pop("content", {}).items():
        yield f"  {kind} {as_type(content.pop('schema'))}"
        for title, example in content.pop("examples", {}).items():
            yield f"    {title} {json.dumps(example['value'] if example.keys() == {'value'} else example)}"
        yield from _rest(content)
    answers: dict[str, list[str]] = {}
    for status, answer in operation.pop("responses").items():
        contents = answer.pop("content", {}).items()
        content = ", ".join(f"{kind} {as_type(part.pop('schema'))}{_words(part)}" for kind, part in contents)
        answers.setdefault(content, []).append(_share(shared, status, json.dumps(answer), name))
    yield from (f"  {', '.join(statuses)}: {content}" for content, statuses in answers.items())
    either = [
        " and ".join(f"{kind} {scopes}" for kind, scopes in each.items()) for each in operation.pop("security")
    ]
    yield f"  security {' or '.join(either)}"
    yield from _rest(operation)


def _parameter(part: dict[str, Any]) -> str:
    return f"{as_type(part.pop('schema'))}{_words(part)}"


def _component(name: str, schema: dict[str, Any], known: dict[str, str]) -> Iterator[str]:
    """Yield a schema by name: its fields, optional ones with a question mark, known long ones by name."""
    _leave_out(schema, "title", name)
    if "properties" not in schema:
        yield f"{name}: {as_type(schema)}"
        return
    fields = _fields(schema)
    _leave_out(schema, "type", "object")
    yield f"{name}: {schema.pop('description', '')}".rstrip()
    again: dict[str, list[str]] = {}
    for field in fields:
        first = known.setdefault(field, name) if len(field) >= MIN_SHARED_CHARACTERS else name
        if first == name:
            yield f"  {field}"
        else:
            again.setdefault(first, []).append(field.partition(":")[0])
    yield from (f"  as in {first}: {', '.join(names)}" for first, names in again.items())
    yield from _rest(schema)


def _fields(schema: dict[str, Any]) -> list[str]:
    """Take the fields of an object out of its schema."""
    properties, required = schema.pop("properties"), schema.pop("required", [])
    if unknown := [name for name in required if name not in properties]:
        schema["required"] = unknown
    return [f"{name}{'' if name in required else '?'}: {as_type(part)}" for name, part in properties.items()]


def as_type(schema: Any) -> str:
    """Return a schema as a type, which is followed by the keywords that types have no words for."""
    if not isinstance(schema, dict):
        return json.dumps(schema)
    rest = dict(schema)
    if "$ref" in rest:
        text = rest.pop("$ref").removeprefix("#/components/schemas/")
    elif "anyOf" in rest:
        text = " | ".join(map(as_type, rest.pop("anyOf")))
    elif "const" in rest or "enum" in rest:
        values = [rest.pop("const")] if "const" in rest else rest.pop("enum")
        text = " | ".join(map(json.dumps, values))
        _leave_out(rest, "type", JSON_TYPES.get(type(values[0])))
    elif "properties" in rest:
        text = f"{{{', '.join(_fields(rest))}}}"
        _leave_out(rest, "type", "object")
    elif rest.get("type") == "array" and "items" in rest:
        text = f"{rest.pop('type')} of {as_type(rest.pop('items'))}"
    else:
        text = rest.pop("type", "any")
    return text + _words(rest)


def _leave_out(schema: dict[str, Any], key: str, implied: Any) -> None:
    """Take out a keyword that the type implies; one that is absent or differs is written."""
    if schema.setdefault(key, ...) == implied:
        schema.pop(key)


def _words(rest: dict[str, Any]) -> str:
    """Return keywords with their values, in parentheses."""
    return f" ({', '.join(_parts(rest))})" if rest else ""


def _parts(rest: dict[str, Any]) -> list[str]:
    return [f"no {key}" if value is ... else f"{key} {_value(key, value)}" for key, value in rest.items()]


def _value(key: str, value: Any) -> str:
    schemas = ("not", "if", "then", "additionalProperties", "propertyNames", "contentSchema")
    if key in schemas:
        return as_type(value)
    return " or ".join(map(as_type, value)) if key == "oneOf" else json.dumps(value)


def _rest(rest: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each keyword that is left."""
    yield from (f"  {part}" for part in _parts(rest) if not part.endswith(" {}"))


def _share(shared: dict[str, Any], name: str, part: str, operation: str) -> str:
    """Return the name of a part, which has its operation's behind it where another part has the plain name."""
    same = [each for each, other in shared.items() if other == part and each.partition(" of ")[0] == name]
    chosen = same[0] if same else f"{name} of {operation}" if name in shared else name
    shared[chosen] = part
    return chosen


if __name__ == "__main__":
    RECORDED.write_text(recorded(), encoding="utf-8")
