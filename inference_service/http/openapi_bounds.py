"""Bounds in the schemas of bodies: `serving.bounds` judges them, for all doors, and this tells them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel

from inference_service.core.sampling import MAX_BIAS, Number
from inference_service.http.wire.fields import table
from inference_service.http.wire.reply import Json
from inference_service.serving.bounds import IDS, LOGPROBS_MODES, NUMBERS, SANE_ID, TEXTS
from inference_service.serving.turns import MAX_TOOLS

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
"""By field and type."""


def tell_bounds(kind: type[BaseModel], schemas: Mapping[str, Json]) -> None:
    """Add to the schema of a body what its fields may hold; what the body says itself stays."""
    nouns = {row.wire: row.noun for row in table(kind)}
    for name, told in schemas[kind.__name__].get("properties", {}).items():
        for branch in told.get("anyOf", [told]):
            for keyword, value in _bounds(nouns.get(name, ""), branch).items():
                if keyword == "additionalProperties":
                    branch[keyword] = value
                else:
                    branch.setdefault(keyword, value)


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
    told: Json = {"exclusiveMinimum": 0} if number.low == math.ulp(0.0) else {"minimum": kind(number.low)}
    return told if number.high == math.inf else told | {"maximum": kind(number.high)}


def _of_text(name: str) -> Json:
    _, longest = TEXTS[name]
    return {"minLength": 1, "maxLength": longest}
