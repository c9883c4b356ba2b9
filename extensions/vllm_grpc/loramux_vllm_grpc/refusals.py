"""Fields of others' messages that are not served, by name."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from loramux_shared.faults import Fault, Finding, MethodUnsupported, RequestInvalid
from loramux_shared.wording import MAX_FINDINGS

LISTED: Final = 8
"""Findings that a message spells out."""
Method = Callable[..., Awaitable[Any]]
"""A method of a servicer."""


def refused(name: str, why: str) -> Method:
    """Return a method that raises `MethodUnsupported`."""

    async def refuse(_servicer: object, _request: object, _context: object) -> None:
        raise MethodUnsupported(f"{name} is not served: {why}")

    return refuse


def refused_stream(name: str, why: str) -> Callable[..., AsyncGenerator[Any]]:
    """Return the same for a method that answers with a stream."""

    async def refuse(_servicer: object, _request: object, _context: object) -> AsyncGenerator[Any]:
        raise MethodUnsupported(f"{name} is not served: {why}")
        yield

    return refuse


def no_prompt(where: str, expected: str) -> RequestInvalid:
    """Return the fault of a request without a prompt."""
    finding = Finding(code="E_MISSING_FIELD", where=where, expected=expected)
    return RequestInvalid("the request lacks a prompt.", [finding])


@contextmanager
def spelled_out() -> Iterator[None]:
    """Tell the findings of a fault in its message too: gateways pass on nothing else of a status."""
    try:
        yield
    except Fault as fault:
        if not fault.findings:
            raise
        details = "; ".join(map(str, fault.findings[:LISTED]))
        raise fault.with_message(f"{fault.message} {details}") from fault


def refuse_fields(message: Message, unsupported: Mapping[str, str]) -> None:
    """Refuse the fields of a request that are not served, and those whose numbers nobody knows here.

    unsupported holds cures by field; a field of a message inside it stands behind a point.

    Raises:
        RequestInvalid: one of them is set.
    """
    findings = [
        Finding(code="E_UNSUPPORTED", where=name, fix=fix)
        for name, fix in unsupported.items()
        if _is_set(message, name.split("."))
    ]
    if not findings:  # a request that is refused as a whole may hold anything
        findings = [
            Finding(code="E_UNKNOWN_FIELD", where=where, found="an unknown field", fix="Leave it out.")
            for where in unknown_fields(message)
        ]
    if findings:
        names = ", ".join(finding.where for finding in findings[:MAX_FINDINGS])
        raise RequestInvalid(f"the request has fields that are not served: {names}.", findings[:MAX_FINDINGS])


def unknown_fields(message: Message, path: str = "") -> Iterator[str]:
    """Yield the places of fields that are in no definition here: ``sampling_params.29`` is one of number 29."""
    unknown = UnknownFieldSet(message)
    yield from (f"{path}{unknown[at].field_number}" for at in range(len(unknown)))
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for inner in (value,) if isinstance(value, Message) else value:
            yield from unknown_fields(inner, f"{path}{field.name}.")


def _is_set(message: Message, path: Sequence[str]) -> bool:
    for name in path[:-1]:
        if not message.HasField(name):
            return False
        message = getattr(message, name)
    return any(field.name == path[-1] for field, _ in message.ListFields())
