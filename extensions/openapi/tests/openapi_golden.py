"""``python -m tests.openapi_golden``: write the recorded OpenAPI document again."""

import json
from pathlib import Path
from typing import Any, Final

from inference_service.http.app import ENDPOINTS
from loramux_openapi.document import ServerFacts, document

RECORDED: Final = Path(__file__).with_name("openapi.json")
MAX_LINE_CHARACTERS: Final = 200
"""A value that fits into a line has one; others have a line for each part."""


def described() -> bytes:
    """Return the document of a server with all kinds of models; operations name answers and parameters."""
    found = json.loads(json.dumps(document(ENDPOINTS, ServerFacts("base", "scorer", "classifier"))))
    shared: dict[str, dict[str, Any]] = {"responses": {}, "parameters": {}}
    for operation in (each for methods in found["paths"].values() for each in methods.values()):
        parameters = [(each["name"], each) for each in operation.get("parameters", ())]
        for field, parts in (("responses", operation["responses"].items()), ("parameters", parameters)):
            operation[field] = [
                _name(shared[field], name, part, operation["operationId"]) for name, part in parts
            ]
    return (_lines(found | shared) + "\n").encode()


def _name(known: dict[str, Any], name: str, part: Any, operation: str) -> str:
    """Return the name of a part, which has its operation's behind it where another part has the plain name."""
    same = [each for each, other in known.items() if other == part and each.partition(" ")[0] == name]
    chosen = same[0] if same else f"{name} of {operation}" if name in known else name
    known[chosen] = part
    return chosen


def _lines(value: Any, indent: str = "") -> str:
    """Return JSON whose lines are short, so that a diff can be read."""
    text = json.dumps(value, ensure_ascii=False)
    if len(indent) + len(text) <= MAX_LINE_CHARACTERS or not isinstance(value, dict | list):
        return text
    inner = indent + " "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_lines(each, inner)}" for key, each in value.items()]
    else:
        parts = [_lines(each, inner) for each in value]
    return f"{text[0]}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{text[-1]}"


if __name__ == "__main__":
    RECORDED.write_bytes(described())
