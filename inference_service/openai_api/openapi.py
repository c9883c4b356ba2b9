"""The description of the door as an OpenAPI document.

Source: https://spec.openapis.org/oas/v3.1.1.html
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any, Final

from pydantic.json_schema import models_json_schema

from inference_service.openai_api.endpoint import Endpoint
from inference_service.openai_api.messages.errors import is_here
from inference_service.openai_api.reply import Json

OPENAPI: Final = "3.1.1"
SCHEMAS: Final = "#/components/schemas/"
KEY: Final = "key"
"""The name of the one kind of credentials."""
ABOUT: Final = (
    "OpenAI's API, and Anthropic's messages, of a loramux replica; a model is the base or one of its adapters. "
    "The schemas say which parameters there are and of which types; one that can only be null is refused. What "
    "they mean, and their bounds: docs/openai.md and docs/anthropic.md."
)
ERROR: Final[Json] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ANTHROPIC_ERROR: Final[Json] = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {
                "type": {"type": "string"},
                "message": {"type": "string"},
                "details": {"type": "object", "properties": {"error_code": {"type": "string"}}},
            },
        },
        "request_id": {"type": ["string", "null"]},
    },
}
_PARAMETER: Final = re.compile(r"{(\w+)(?::\w+)?}")


@cache
def document(endpoints: tuple[Endpoint, ...]) -> Json:
    """Return the document that describes routes, with the schemas of what they read."""
    paths: dict[str, Json] = {}
    for endpoint in endpoints:
        path = _PARAMETER.sub(r"{\1}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, path)
    bodies = dict.fromkeys(endpoint.body for endpoint in endpoints if endpoint.body)
    _, schemas = models_json_schema(
        [(body, "validation") for body in bodies], ref_template=f"{SCHEMAS}{{model}}"
    )
    return {
        "openapi": OPENAPI,
        "info": {"title": "loramux", "version": version("loramux"), "description": ABOUT},
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR, "AnthropicError": ANTHROPIC_ERROR} | schemas.get("$defs", {}),
            "securitySchemes": {
                KEY: {"type": "http", "scheme": "bearer", "description": "Where the server has keys."}
            },
        },
    }


def _operation(endpoint: Endpoint, path: str) -> Json:
    error = f"{SCHEMAS}{'AnthropicError' if is_here(path) else 'Error'}"
    failed = {"description": "It failed.", "content": _content(("application/json",), error)}
    refuses = endpoint.status >= 400
    answer: Json = {"description": "Always." if refuses else "All is well."}
    if endpoint.media:
        answer["content"] = _content(endpoint.media, error if refuses else "")
    operation: Json = {
        "operationId": "_".join([endpoint.method.lower(), *re.findall(r"\w+", path)]),
        "summary": (endpoint.handler.__doc__ or "").partition("\n")[0],
        "security": [{KEY: [endpoint.scope.value]}] if endpoint.scope else [],
        "responses": {str(endpoint.status): answer, "default": failed},
    }
    if names := _PARAMETER.findall(endpoint.path):
        operation["parameters"] = [_parameter(name) for name in names]
    if endpoint.body:
        read = _content(("application/json",), SCHEMAS + endpoint.body.__name__)
        operation["requestBody"] = {"required": True, "content": read}
    return operation


def _parameter(name: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _content(media: Sequence[str], reference: str) -> dict[str, Any]:
    return {kind: {"schema": {"$ref": reference}} if reference else {} for kind in media}
