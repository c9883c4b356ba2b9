"""``python -m tests.openapi_golden``: write the recorded OpenAPI document again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from inference_service.http.app import ENDPOINTS
from loramux_openapi.document import ServerFacts, document

RECORDED: Final = Path(__file__).with_name("openapi.json")
MAX_LINE_CHARACTERS: Final = 200
"""A value that fits into a line has one; others have a line for each part."""


def described() -> bytes:
    """Return the OpenAPI document of a server with a model of every kind, with every answer written once."""
    found = json.loads(json.dumps(document(ENDPOINTS, ServerFacts("base", "scorer", "classifier"))))
    found["components"]["responses"] = dict(_shared_answers(found["paths"]))
    return (_lines(found) + "\n").encode()


def _shared_answers(paths: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Put a reference in the place of every answer, and yield the name and the content of each answer once."""
    names: dict[str, str] = {}
    for operations in paths.values():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                text = json.dumps(answer)
                if text not in names:
                    taken = status in names.values()
                    names[text] = f"{status}_{operation['operationId']}" if taken else status
                    yield names[text], answer
                operation["responses"][status] = {"$ref": f"#/components/responses/{names[text]}"}


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
