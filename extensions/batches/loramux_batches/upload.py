"""Forms as clients upload files with them: ``multipart/form-data`` (RFC 7578), read as it arrives."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from loramux_shared.faults import RequestInvalid

MAX_HEAD: Final = 8 << 10
"""Bytes of the headers of one part."""
BROKEN: Final = "the body is no form: expected multipart/form-data (RFC 7578), found {found}."


@dataclass(frozen=True)
class Part:
    """The beginning of a part of a form."""

    name: str
    filename: str | None


async def read_form(http: HttpRequest) -> AsyncIterator[Part | bytes]:
    """Yield the parts of a form, each followed by its bytes as they arrive.

    Raises:
        HTTPException: 415 where the body is no form.
        RequestInvalid: the form is broken.
        ClientDisconnect: the client went away.
    """
    declared = Message()
    declared["content-type"] = http.headers.get("content-type", "")
    boundary = declared.get_param("boundary")
    if declared.get_content_type() != "multipart/form-data" or not isinstance(boundary, str) or not boundary:
        raise HTTPException(
            415,
            f"expected a form with content-type: multipart/form-data, found {declared['content-type'][:80]!r}.",
        )
    mark, data, in_part = f"\r\n--{boundary}".encode(), b"\r\n", False
    stream = http.stream()
    async for more in stream:
        data += more
        while (place := data.find(mark)) >= 0 and len(data) >= place + len(mark) + 2:
            if in_part and place:
                yield data[:place]
            rest = data[place + len(mark) :]
            if rest.startswith(b"--"):
                async for _ in stream:
                    pass
                return
            head, end, body = rest.partition(b"\r\n\r\n")
            if (not in_part and place) or not rest.startswith(b"\r\n") or len(head) > MAX_HEAD:
                raise RequestInvalid(BROKEN.format(found="a part without a head"))
            if not end:
                data = data[place:]
                break
            yield _begun(head[2:])
            data, in_part = body, True
        else:
            kept = len(mark) + 2
            if in_part and len(data) > kept:
                yield data[:-kept]
                data = data[-kept:]
            elif len(data) > MAX_HEAD:
                raise RequestInvalid(BROKEN.format(found="no beginning of a part"))
    raise RequestInvalid(BROKEN.format(found="no end"))


def _begun(head: bytes) -> Part:
    headers = HeaderParser().parsestr(head.decode(errors="replace"))
    name = headers.get_param("name", header="content-disposition")
    if headers.get_content_disposition() != "form-data" or not isinstance(name, str):
        raise RequestInvalid(BROKEN.format(found="a part without a name"))
    try:
        filename = headers.get_filename()
        (filename or "").encode()
    except ValueError as error:  # the charset that it states is not one of text, or not its own
        raise RequestInvalid(BROKEN.format(found="a filename that is no text")) from error
    return Part(name, filename)
