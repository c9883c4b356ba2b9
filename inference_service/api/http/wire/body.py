"""Bodies and queries of requests: how they are read, and which fields of a request their fields are.

A body is the field table of its API: a row is a field with type, note and noun. The noun is the field of a
request that a field of a body is. From it follow the values that a request takes from a body, the names in
faults, and the bounds in `openapi`.
"""

import json
from collections.abc import Iterator, Mapping, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Final, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic.annotated_handlers import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from inference_service.api.chat.request import naming
from inference_service.api.http.wire.errors import invalid_body, invalid_query, is_tag, refused_twice
from inference_service.api.requests.bounds import JSON
from loramux_shared.faults import RequestInvalid
from loramux_shared.rpc.options import MAX_REQUEST_BYTES
from loramux_shared.wording import refuse_odd

Examples = Mapping[str, Mapping[str, Any]]
"""Bodies, by what they show."""


OPEN: Final = ConfigDict(extra="allow")
"""Configuration of a part of a body that may have other fields: clients send back what they got."""


class Body(BaseModel):
    """A JSON object: unknown keys, wrong types and numbers that are none are refused; null is "not set"."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    media_type: ClassVar[str] = "application/json"
    examples: ClassVar[Examples] = {}
    """Examples by what they show; their model is one that is served. They are valid, and tests send them."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the schema, in which an unknown field may be null: `_restated` leaves it out."""
        schema = handler(core)
        handler.resolve_ref_schema(schema)["additionalProperties"] = {"type": "null"}
        return schema


def having(name: str, value: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object with a field of a schema."""
    return {"required": [name], "properties": {name: value}}


HAS_TOOLS: Final = having("tools", {"type": "array", "minItems": 1})
"""Schema of a body with a tool, which a demanded call needs."""


def unsupported(found: str, served: str) -> PydanticCustomError:
    """Return the error of what this server cannot honour, with what it can."""
    return PydanticCustomError("unsupported", "{served}", {"found": found[:200], "served": served})


def unserved(served: str, harmless: tuple[Any, ...] = (None,)) -> BeforeValidator:
    """Return what refuses every value but those that ask for nothing, and says what is served."""

    def refused(value: Any) -> None:
        if not any(type(value) is type(each) and value == each for each in harmless):
            raise unsupported(_excerpt(value), served)

    values = Annotated[Any, WithJsonSchema({"enum": list(harmless)})]
    return BeforeValidator(refused, json_schema_input_type=None if harmless == (None,) else values)


def only(values: tuple[Any, ...], served: str, form: Any) -> BeforeValidator:
    """Return what refuses every other value, and says what is served; form is the type in the schema."""

    def checked(value: Any) -> Any:
        if value not in values:
            raise unsupported(str(value), served)
        return value

    return BeforeValidator(checked, json_schema_input_type=form)


def at_least_one(kind: str, name: str) -> AfterValidator:
    """Return what refuses an empty list, with the kind of the error and the name of an item."""

    def checked(items: Sized) -> Sized:
        if not items:
            raise PydanticCustomError(kind, "at least one {name}", {"name": name})
        return items

    return AfterValidator(checked)


def _excerpt(value: Any) -> str:
    if isinstance(value, str | bool):
        return json.dumps(value)
    return "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else "a number"


B = TypeVar("B", bound=Body)
TOKEN_IDS: Final = "prompt"  # noqa: S105 - no secret
"""Kind of the error of a prompt that is neither text nor token ids."""
MAX_EXACT: Final = 2**53
"""From here on a float is no exact integer."""
MAX_DISCARDED_BYTES: Final = 64 * 1024 * 1024
"""A body that is too large is read up to here: most clients read an answer when they have sent all."""


async def read_body(http: Request, kind: type[B]) -> B:
    """Return the body as a model of its kind.

    Raises:
        RequestInvalid: it is no JSON or has too much in it, or a field is unknown, missing or of a wrong type.
        HTTPException: 413 where it is too large, 415 where it does not say that it is JSON.
        ClientDisconnect: the client went away.
    """
    media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(
            415, f"expected a JSON body with content-type: application/json, found {media_type[:80]!r}."
        )
    data = await read_bytes(http)
    if much := JSON.exceeded_by(data):
        raise RequestInvalid(f"the body has {much}. Send less.")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        refused = error
    try:
        return kind.model_validate_json(_restated(data, refused))
    except ValidationError as error:
        raise invalid_body(error, list(kind.model_fields)) from error


def _restated(data: bytes, refused: ValidationError) -> bytes:
    """Return a body with 5 for 5.0, which is an integer of JSON Schema too, where an integer was expected, and
    without the unknown fields that are null: clients send all that they know of, unset.
    """
    found = refused.errors(include_url=False)
    nulls = [each["loc"] for each in found if each["type"] == "extra_forbidden" and each["input"] is None]
    numbers = any(each["type"] in ("int_type", TOKEN_IDS) for each in found)
    if not nulls and not numbers:
        return data
    body = json.loads(data, parse_float=_whole if numbers else None)  # noqa: TID251 - its size was judged
    for *places, name in nulls:
        holder = body
        for place in places:
            holder = holder if is_tag(place) else holder[place]
        holder.pop(name, None)  # a name may come twice
    return json.dumps(body).encode()


def _whole(text: str) -> int | float:
    number = float(text)
    return int(number) if number.is_integer() and abs(number) < MAX_EXACT else number


async def read_bytes(http: Request) -> bytes:
    """Return the body; raise HTTPException 413 where it is too large, and ClientDisconnect."""
    data, size = bytearray(), 0
    async for part in http.stream():
        size += len(part)
        if size <= MAX_REQUEST_BYTES:
            data += part
        elif size > MAX_DISCARDED_BYTES:
            break
    if size > MAX_REQUEST_BYTES:
        raise HTTPException(413, f"the body is larger than {MAX_REQUEST_BYTES} bytes.")
    return bytes(data)


class Query(BaseModel):
    """The type of a query: unknown names and values of other types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _plain_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse_odd(value, cls.model_fields[str(info.field_name)].annotation)


Q = TypeVar("Q", bound=Query)


def read_query(http: Request, kind: type[Q]) -> Q:
    """Return the query as a model of its kind; raise RequestInvalid for a name that is unknown or comes twice,
    and for a value of another type.
    """
    query = http.query_params
    if len(query.multi_items()) > len(query):
        raise refused_twice(query.multi_items())
    try:
        return kind.model_validate_strings(dict(query))
    except ValidationError as error:
        raise invalid_query(error, list(kind.model_fields)) from error


T = TypeVar("T")


@dataclass(frozen=True)
class Noun:
    """The field of a request that a body's field becomes."""

    name: str = ""
    """Empty: the one of the same name."""
    also: tuple[str, ...] = ()
    """Other fields that faults name where this one is meant."""
    taken: bool = True
    """True if a request has its value as it is; else the API's mapping converts it."""


Same = Annotated[T, Noun()]
"""A field that a request has under the same name."""
Made = Annotated[T, Noun(taken=False)]
"""The same, where the mapping makes something of its value."""


@dataclass(frozen=True)
class FieldRow:
    """A field of a body, or of an object within it."""

    path: tuple[str, ...]
    noun: str
    also: tuple[str, ...]
    taken: bool

    @property
    def wire(self) -> str:
        """Return the client's name of it."""
        return ".".join(self.path)

    def value(self, body: BaseModel) -> Any:
        """Return what a body says; None where nothing."""
        value: Any = body
        for name in self.path:
            value = None if value is None else getattr(value, name)
        return value


@cache
def table(kind: type[BaseModel]) -> tuple[FieldRow, ...]:
    """Return the rows of a body that have a noun."""
    return tuple(_rows(kind))


def _rows(kind: type[BaseModel]) -> Iterator[FieldRow]:
    for name, field in kind.model_fields.items():
        nouns = [each for each in field.metadata if isinstance(each, Noun)]
        for noun in nouns:
            yield FieldRow((name,), noun.name or name, noun.also, noun.taken)
        for held in get_args(field.annotation) if not nouns else ():
            if isinstance(held, type) and issubclass(held, BaseModel):
                for row in table(held):
                    yield FieldRow((name, *row.path), row.noun, row.also, row.taken)


def request_fields(body: Body) -> dict[str, Any]:
    """Return what a request takes over from a body, by its own fields; what is not set is left out."""
    rows = table(type(body))
    known = ((row.noun, row.value(body)) for row in rows if row.taken and row.path[0] in body.model_fields_set)
    return {noun: value for noun, value in known if value is not None}


def names(body: Body) -> dict[str, str]:
    """Return what a client calls the fields of requests in a body; of two names the one that it set."""
    rows = table(type(body))
    found: dict[str, str] = {}
    for row in (*(row for row in rows if row.value(body) is not None), *rows):
        for noun in (row.noun, *row.also):
            found.setdefault(noun, row.wire)
    return found


def in_words_of(body: Body) -> AbstractContextManager[None]:
    """Name fields in faults as a body does."""
    return naming(lambda where: names(body).get(where, where))
