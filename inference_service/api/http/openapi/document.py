"""The description of the HTTP API as an OpenAPI document.

Source: https://spec.openapis.org/oas/v3.1.1.html
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel, TypeAdapter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.api.http.endpoint import Endpoint
from inference_service.api.http.openapi.parts import (
    DIGEST_HEADERS,
    HINTS,
    RETRY_AFTER,
    SECURITY,
    WORDS,
    Json,
    event_schema,
    operation_id,
    path_parameter,
    query_parameters,
)
from inference_service.api.http.vectors.embeddings import ClassifyBody, ScoringBody
from inference_service.api.http.vectors.tei import PredictBody
from inference_service.api.http.wire.body import Body, table
from inference_service.api.http.wire.errors import AGAIN
from inference_service.api.http.wire.reply import EventStream, Reply
from inference_service.api.requests.bounds import (
    IDS,
    LOGPROBS_MODES,
    MAX_TOOLS,
    NUMBERS,
    TEXTS,
    largest_numbers,
)
from inference_service.api.requests.service import GenerationService
from inference_service.core.sampling import MAX_BIAS, Number
from loramux_shared.pages import page
from loramux_shared.wording import SANE_ID

VERSION: Final = "3.1.1"
SCHEMAS: Final = "#/components/schemas/"
ABOUT: Final = (
    "OpenAI's API, and Anthropic's messages, of a loramux replica; a model is the base or one of its adapters. "
    "The schemas list the parameters with their types and bounds; one that can only be null is refused, and "
    f"null is the same as unset. Their meaning: {page('docs/reference/openai.md')} and "
    f"{page('docs/reference/anthropic.md')}. Not "
    "listed here: a method that a path does not have gets 405, and a request that is not HTTP/1.1 gets 400, "
    "417, 501 or 505. Answers may get new fields: ignore unknown ones."
)
EVERYWHERE: Final = (400, 408, 431, 500, 503)
"""Statuses of failures that any request may meet."""
OF_KEYS: Final = (401, 403)
OF_BODIES: Final = (413, 415)
EVENTS: Final = "text/event-stream"
Mode = Literal["validation", "serialization"]
_PARAMETER: Final = re.compile(r"{(\w+)(:\w+)?}")
_REFERENCE: Final = re.compile(rf"'{SCHEMAS}([^']+)'")


@dataclass(frozen=True)
class ServerFacts:
    """The properties of a server that its document depends on."""

    model: str
    """The name that examples ask."""
    scorer: str = ""
    """One whose head has one label; examples of scores and orders ask it, and there are none without it."""
    classifier: str = ""
    """One whose head has labels; the same for classes."""
    keyless: bool = False
    """True if no key is required."""
    begins: bool = True
    """True if its tokenizer begins every text with a token; an empty text is no prompt elsewhere."""
    vocab: int | None = None
    """Number of tokens that ids may name."""
    largest: tuple[tuple[str, int], ...] = ()
    """The bounds of numbers that the server sets, by field."""
    poolings: tuple[str, ...] = ()
    """The poolings that requests may name; empty: any."""

    def model_of(self, body: type[Body]) -> str:
        """Return the model that examples of a body ask; empty where no model answers it."""
        if not issubclass(body, ScoringBody | PredictBody):
            return self.model
        return self.classifier if issubclass(body, ClassifyBody | PredictBody) else self.scorer


async def show_openapi(service: GenerationService, http: HttpRequest) -> Response:
    """Return this description."""
    from inference_service.api.http.app import ENDPOINTS  # which imports this module

    return Reply(document(ENDPOINTS, facts_of(service, keyless=http.app.state.keyless)))


def facts_of(service: GenerationService, *, keyless: bool) -> ServerFacts:
    """Return what the document of a server depends on."""
    models = list(service.local.catalog)
    vocab = max([service.text.vocab, *(model.vocab or 0 for model in models)])
    largest = largest_numbers(vocab, service.max_queue, service.limits.max_seq_len)
    return ServerFacts(
        model=next(
            (model.name for model in models if model.num_labels is None), service.local.catalog.base_name
        ),
        scorer=next((model.name for model in models if model.num_labels == 1), ""),
        classifier=next((model.name for model in models if model.num_labels), ""),
        keyless=keyless,
        begins=bool(service.text.encode("")),
        vocab=vocab,
        largest=(*largest.items(), ("dimensions", service.limits.hidden_size)),
        poolings=service.poolings,
    )


def answer_of(endpoint: Endpoint) -> Any:
    """Return the type of a JSON answer; None where the handler returns none."""
    return _held_by(endpoint, Reply)


def event_of(endpoint: Endpoint) -> Any:
    """Return the type of the events of a stream; None where the handler returns none."""
    return _held_by(endpoint, EventStream)


def _held_by(endpoint: Endpoint, kind: type) -> Any:
    returned = get_type_hints(endpoint.handler)["return"]
    held = [get_args(each) for each in (returned, *get_args(returned)) if get_origin(each) is kind]
    return held[0][0] if held else None


@lru_cache(8)
def document(endpoints: tuple[Endpoint, ...], served: ServerFacts) -> Json:
    """Return the document that describes routes, with the schemas of what they read and answer."""
    schemas = _schemas(endpoints)
    for kind in {each.body for each in endpoints if each.body}:
        _narrow(kind, schemas, served)
        if not served.begins:
            _refuse_empty(kind, schemas)
    paths: dict[str, Json] = {}
    for endpoint in endpoints:
        path = _PARAMETER.sub(r"{\1}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, path, schemas, served)
    components: Json = {"schemas": _used(schemas, paths)}
    if not served.keyless:
        components["securitySchemes"] = dict(SECURITY)
    return {
        "openapi": VERSION,
        "info": {"title": "loramux", "version": version("loramux"), "description": ABOUT},
        "paths": paths,
        "components": components,
    }


def _schemas(endpoints: tuple[Endpoint, ...]) -> dict[str, Json]:
    """Return the schemas of all bodies, queries and answers, by name."""
    read = [kind for each in endpoints for kind in (each.body, each.query) if kind]
    written = [kind for each in endpoints for kind in (answer_of(each), event_of(each), each.error) if kind]
    kinds: list[tuple[Any, Mode]] = [
        *((kind, "validation") for kind in dict.fromkeys(read)),
        *((kind, "serialization") for kind in dict.fromkeys(written)),
    ]
    adapters = [(kind.__name__, mode, TypeAdapter(kind)) for kind, mode in kinds]
    _, generated = TypeAdapter.json_schemas(adapters, ref_template=f"{SCHEMAS}{{model}}")
    schemas: dict[str, Json] = generated["$defs"]
    for kind in dict.fromkeys(read):
        tell_bounds(kind, schemas)
    for schema in schemas.values():
        for field in schema.get("properties", {}).values():
            field.pop("title", None)  # the title repeats the field's name
            if "default" in field and field["default"] in (None, []):
                del field["default"]
    return schemas


def _used(schemas: dict[str, Json], paths: dict[str, Json]) -> dict[str, Json]:
    """Return the schemas that paths refer to, and those that these refer to."""
    found: dict[str, Json] = {}
    new = _REFERENCE.findall(str(paths))
    while new:
        found |= {name: schemas[name] for name in new}
        new = [name for name in _REFERENCE.findall(str(found)) if name not in found]
    return dict(sorted(found.items()))


def _operation(endpoint: Endpoint, path: str, schemas: dict[str, Json], served: ServerFacts) -> Json:
    guarded = endpoint.scope is not None and not served.keyless
    operation: Json = {
        "operationId": operation_id(endpoint.method, path),
        "summary": (endpoint.handler.__doc__ or "").partition("\n")[0],
        "security": [{name: [str(endpoint.scope)]} for name in SECURITY] if guarded else [],
        "responses": dict(_responses(endpoint, guarded=guarded, keyless=served.keyless)),
    }
    parameters = [
        path_parameter(name, served.model if name == "model" else "", slashes=bool(kind))
        for name, kind in _PARAMETER.findall(endpoint.path)
    ]
    if endpoint.query:
        parameters += query_parameters(schemas[endpoint.query.__name__])
    if endpoint.hinted:
        parameters += HINTS
    if parameters:
        operation["parameters"] = parameters
    if endpoint.body:
        read: Json = {"schema": {"$ref": SCHEMAS + endpoint.body.__name__}}
        model = served.model_of(endpoint.body)
        model_field = {"model": model} if "model" in endpoint.body.model_fields else {}
        if (examples := endpoint.body.examples) and model:
            read["examples"] = {
                name: {"value": {**model_field, **example}} for name, example in examples.items()
            }
        operation["requestBody"] = {"required": True, "content": {endpoint.body.media_type: read}}
    return operation


def _responses(endpoint: Endpoint, *, guarded: bool, keyless: bool) -> Iterator[tuple[str, Json]]:
    """Yield what an operation may answer, by status."""
    failures = {*EVERYWHERE, *endpoint.fails}
    if guarded:
        failures.update(OF_KEYS)
    if keyless:
        failures.add(403)  # a page of another site, and a name that is not the server's
    if endpoint.body:
        failures.update(OF_BODIES)
    answer: Json = {"description": "All is well.", "content": dict(_content(endpoint))}
    if endpoint.hinted:
        answer["headers"] = DIGEST_HEADERS
    yield "200", answer
    error = {"application/json": {"schema": {"$ref": SCHEMAS + endpoint.error.__name__}}}
    for status in sorted(failures):
        failed: Json = {"description": WORDS[status], "content": error}
        if status in AGAIN:
            failed["headers"] = RETRY_AFTER
        yield str(status), failed


def _content(endpoint: Endpoint) -> Iterator[tuple[str, Json]]:
    """Yield the schemas of answers, by media type."""
    if endpoint.text:
        yield endpoint.text, {"schema": {"type": "string"}}
        return
    answer, event = answer_of(endpoint), event_of(endpoint)
    yield "application/json", {"schema": {"$ref": SCHEMAS + answer.__name__} if answer else {"type": "object"}}
    if event:
        events = [SCHEMAS + kind.__name__ for kind in (event, endpoint.error)]
        yield EVENTS, {"schema": event_schema(events)}


LIMITS: Final = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
OTHERS: Final[Mapping[tuple[str, str], Json]] = {
    ("request_id", "string"): {"pattern": f"^{SANE_ID.pattern}$"},
    ("logprobs_mode", "string"): {"enum": list(LOGPROBS_MODES)},
    ("allowed_token_ids", "array"): {"minItems": 1},
    ("truncate_prompt_tokens", "integer"): {"not": {"const": 0}},
    ("logit_bias", "object"): {
        "maxProperties": IDS["logit_bias"],
        "propertyNames": {"pattern": "^[0-9]+$"},
        "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
    },
    ("tools", "array"): {"maxItems": MAX_TOOLS},
}
"""Schemas by field and type."""


def tell_bounds(kind: type[BaseModel], schemas: Mapping[str, Json]) -> None:
    """Add to the schema of a body what its fields may hold; what the body says itself stays."""
    nouns = {row.wire: row.noun for row in table(kind)}
    for name, schema in schemas[kind.__name__].get("properties", {}).items():
        for branch in schema.get("anyOf", [schema]):
            for keyword, value in _bounds(nouns.get(name, ""), branch).items():
                if keyword == "additionalProperties":
                    branch[keyword] = value
                else:
                    branch.setdefault(keyword, value)


def _narrow(kind: type[BaseModel], schemas: Mapping[str, Json], served: ServerFacts) -> None:
    """Add to the schema of a body what one server serves at most."""
    nouns, largest = {row.wire: row.noun for row in table(kind)}, dict(served.largest)
    for name, field in schemas[kind.__name__].get("properties", {}).items():
        noun = nouns.get(name, name)
        for branch in field.get("anyOf", [field]):
            if noun in largest and branch.get("type") == "integer":
                branch["maximum"] = min(branch.get("maximum", math.inf), largest[noun])
            if noun == "pooling" and branch.get("type") == "string" and served.poolings:
                branch["enum"] = list(served.poolings)
            if served.vocab is not None:
                _narrow_ids(branch, served.vocab)


def _narrow_ids(schema: Json, vocab: int) -> None:
    """Let lists of numbers, all of which are lists of tokens in bodies, name those that there are."""
    items = schema.get("items", {})
    if items.get("type") == "integer":
        items["maximum"] = vocab - 1
    for branch in items.get("anyOf", ()):
        _narrow_ids(branch, vocab)


def _refuse_empty(kind: type[BaseModel], schemas: Mapping[str, Json]) -> None:
    """Add to the schema of a body that the texts of its prompts have a character."""
    for row in table(kind):
        if row.noun == "prompt" and len(row.path) == 1:
            field = schemas[kind.__name__]["properties"][row.path[0]]
            for branch in field.get("anyOf", [field]):
                items = branch.get("items", {})
                for text in (branch, items, *items.get("anyOf", ())):
                    if text.get("type") == "string":
                        text["minLength"] = 1


def _bounds(name: str, branch: Json) -> Json:
    form = branch.get("type", "")
    bounds: Json = {}
    if form in ("integer", "number") and name in NUMBERS and not branch.keys() & LIMITS:
        bounds |= _of_number(NUMBERS[name], int if form == "integer" else float)
    if form == "string" and name in TEXTS:
        bounds |= _of_text(name)
    if form == "array" and name in TEXTS:
        most, _ = TEXTS[name]
        bounds |= {"maxItems": most, "items": branch["items"] | _of_text(name)}
        branch.pop("items")
    if form == "array" and name in IDS:
        bounds |= {"items": {"type": "integer", "minimum": 0}}
        branch.pop("items")
        bounds |= {"maxItems": few} if (few := IDS[name]) else {}
    return bounds | OTHERS.get((name, form), {})


def _of_number(number: Number, kind: Any) -> Json:
    bounds: Json = {"exclusiveMinimum": 0} if number.low == math.ulp(0.0) else {"minimum": kind(number.low)}
    return bounds if number.high == math.inf else bounds | {"maximum": kind(number.high)}


def _of_text(name: str) -> Json:
    _, longest = TEXTS[name]
    return {"minLength": 1, "maxLength": longest}
