"""Reads what stands behind the question mark of a request's path."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from starlette.requests import Request

from inference_service.http.wire.errors import invalid_query, refused_twice
from loramux_shared.digits import refuse_odd


class Query(BaseModel):
    """What a query may hold: unknown names and values of other types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _plain_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse_odd(value, cls.model_fields[str(info.field_name)].annotation)


Q = TypeVar("Q", bound=Query)


def read_query(http: Request, kind: type[Q]) -> Q:
    """Return the query as a model of its kind.

    Raises:
        RequestInvalid: a name is unknown or comes twice, or a value is not of its type.
    """
    said = http.query_params
    if len(said.multi_items()) > len(said):
        raise refused_twice(said.multi_items())
    try:
        return kind.model_validate_strings(dict(said))
    except ValidationError as error:
        raise invalid_query(error, list(kind.model_fields)) from error
