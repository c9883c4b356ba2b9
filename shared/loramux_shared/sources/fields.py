"""Secrets of several fields."""

from collections.abc import Collection

from loramux_shared.faults import SourceRefused
from loramux_shared.sources.secrets import Secrets
from loramux_shared.untrusted_json import JsonInvalid, parse_json


def fields_of(
    secrets: Secrets, name: str, required: Collection[str], optional: Collection[str] = ()
) -> dict[str, str]:
    """Return the fields of a secret that is a JSON object of strings; empty where it is not set.

    Raises:
        SourceRefused: it is something else, lacks a field, or has one that is not known.
    """
    text = secrets.get(name) if name else None
    if text is None:
        return {}
    try:
        data = parse_json(text)
    except JsonInvalid:
        data = None  # the error's text would repeat the secret
    known = {*required, *optional}
    if not (
        isinstance(data, dict)
        and set(required) <= data.keys() <= known
        and all(isinstance(value, str) and value for value in data.values())
    ):
        also = f", and may have {', '.join(optional)}" if optional else ""
        raise SourceRefused(f"secret {name!r}: expected a JSON object with {', '.join(required)}{also}")
    return data
