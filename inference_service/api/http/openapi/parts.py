"""The parts of the OpenAPI document that are the same for many routes."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from inference_service.core.request import GENERATION_IN_HEADER, MIN_GENERATION, STICKY_KEY
from loramux_shared.routes import MODEL_HEADER

Json = dict[str, Any]
"""An object of the document."""
SECURITY: Final[Mapping[str, Json]] = {
    "key": {"type": "http", "scheme": "bearer", "description": "Required if the server has keys."},
    "x_api_key": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "The same keys, as Anthropic's clients send them.",
    },
}
"""The ways to show a key, by name."""
WORDS: Final[Mapping[int, str]] = {
    400: "The request is not valid, or is not served; the error says what was expected and found.",
    401: "The server has keys, and the request shows none that it knows.",
    403: "The key may not do this, or a page of another site asked for it.",
    404: "No model, adapter, generation, file or batch of that name; the error has the nearest.",
    408: "The request did not arrive in time.",
    409: "Another client changes the same thing at the same time.",
    413: "The body is too large.",
    415: "The content type is not JSON.",
    429: "The queue is full, or a limit of the model or the key is reached.",
    431: "The head of the request is too large.",
    500: "An internal error, or damaged data; the log has it under the request's id.",
    503: "The replica drains, failed, is paused or behind, or a service that it needs does not answer.",
    504: "The request took longer than the operator allows.",
    529: "The server is overloaded.",
}
"""Descriptions of the statuses of failures."""
RETRY_AFTER: Final[Json] = {
    "retry-after": {"description": "Seconds.", "required": True, "schema": {"type": "integer", "minimum": 1}}
}
HINTS: Final[Sequence[Json]] = (
    {
        "name": MIN_GENERATION,
        "in": "header",
        "description": "Answer with this generation of the deployment or a later one.",
        "schema": {"type": "string", "pattern": f"^{GENERATION_IN_HEADER}$"},
    },
    {
        "name": STICKY_KEY,
        "in": "header",
        "description": "Requests with the same one get the same model of an alias; it comes before `user`.",
        "schema": {"type": "string"},
    },
)
"""Headers by which requests say what is to answer."""
DIGEST_HEADERS: Final[Json] = {
    MODEL_HEADER: {
        "description": "The model that answers; for an alias, the one that was drawn.",
        "required": True,
        "schema": {"type": "string"},
    },
    "x-loramux-generation": {
        "description": "Generation that the name was looked up in.",
        "required": True,
        "schema": {"type": "integer"},
    },
    "x-loramux-digest": {
        "description": "Digest of the adapter; absent for the base.",
        "schema": {"type": "string"},
    },
}
DONE: Final[Json] = {"const": "[DONE]"}
"""The last event of a stream that did not fail."""


def operation_id(method: str, path: str) -> str:
    """Return a name that generators of clients can make a function of."""
    return "_".join([method.lower(), *re.findall(r"\w+", path)])


def path_parameter(name: str, example: str, *, slashes: bool) -> Json:
    """Return the description of a part of a path, which may hold slashes or may not."""
    parameter: Json = {
        "name": name,
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1},
    }
    if slashes:
        parameter["description"] = "Slashes in it may stand as they are, or as %2F."
    if example:
        parameter["example"] = example
    return parameter


def query_parameters(schema: Json) -> list[Json]:
    """Return the descriptions of what a query may hold, from the schema of all of it."""
    return [
        _query_parameter(name, field, schema.get("required", ()))
        for name, field in schema["properties"].items()
    ]


def _query_parameter(name: str, field: Json, required: Sequence[str]) -> Json:
    schema = {keyword: value for keyword, value in field.items() if keyword not in ("description", "title")}
    if "anyOf" in schema:  # an unset field is absent: a query has no null
        [schema] = [branch for branch in schema["anyOf"] if branch.get("type") != "null"]
    parameter: Json = {"name": name, "in": "query", "required": name in required, "schema": schema}
    return parameter | {keyword: field[keyword] for keyword in ("description",) if keyword in field}


def event_schema(references: Sequence[str]) -> Json:
    """Return the schema of each event of a stream, as readers of such streams see one.

    Its data is JSON of one of the schemas that are referred to, and at the end ``[DONE]``.
    """
    held = {
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [{"$ref": ref} for ref in references]},
    }
    return {
        "description": "Each of the events.",
        "type": "object",
        "required": ["data"],
        "properties": {"event": {"type": "string"}, "data": {"type": "string", "anyOf": [held, DONE]}},
    }
