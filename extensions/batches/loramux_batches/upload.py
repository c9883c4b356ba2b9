"""Forms as clients upload files with them: ``multipart/form-data`` (RFC 7578), read as they arrive."""

import logging
from collections.abc import Collection
from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException

from inference_service.api.requests.bounds import refused
from loramux_batches.records import Pieces
from loramux_shared.faults import RequestInvalid

MAX_PARTS: Final = 16
"""Parts of a form, of which one is the file."""
MAX_FIELD: Final = 1000
"""Bytes of a field that is no file."""
MAX_FRAMING_BYTES: Final = 64 << 10
"""Bytes beside the file's: boundaries, headers, fields, and what is around the parts."""
BROKEN: Final = "the body is no form: expected multipart/form-data (RFC 7578), found {found}."

logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # the refusal says what is wrong


class Form:
    """A form with short fields and one file, whose bytes become pieces. Its methods block."""

    def __init__(self, content_type: str, names: Collection[str], pieces: Pieces, room: int) -> None:
        """Expect fields of these names, and a file of at most room bytes.

        Raises:
            HTTPException: 415 where the body is no form.
        """
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise HTTPException(
                415, f"expected a form with content-type: multipart/form-data, found {content_type[:80]!r}."
            )
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._names = names
        self._pieces = pieces
        self._room = room
        self._size = self._parts = 0
        self._ended = False
        self._name = ""
        """Name of the part that is being read."""
        self._header, self._value = bytearray(), bytearray()
        self._disposition = ""
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_head,
                    "on_part_data": lambda data, start, end: self._add(data[start:end]),
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise RequestInvalid(BROKEN.format(found="a boundary that is too long")) from error

    def write(self, data: bytes) -> None:
        """Take the next bytes of the body.

        Raises:
            RequestInvalid: the form is broken, or has too much beside its file.
            HTTPException: 413 where the file is too large.
        """
        self._size += len(data)
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise RequestInvalid(BROKEN.format(found="no beginning of a part")) from error
        if self._size - self._pieces.size > MAX_FRAMING_BYTES:
            raise RequestInvalid(BROKEN.format(found=f"more than {MAX_FRAMING_BYTES} bytes beside the file"))

    def close(self) -> None:
        """Note the end of the body; raise RequestInvalid where the form has none."""
        if not self._ended:
            raise RequestInvalid(BROKEN.format(found="no end"))

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise RequestInvalid(BROKEN.format(found=f"more than {MAX_PARTS} parts"))
        self._disposition = ""

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value.decode("latin-1")
        self._header.clear()
        self._value.clear()

    def _end_head(self) -> None:
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or b"name" not in options:
            raise RequestInvalid(BROKEN.format(found="a part without a name"))
        self._name = options[b"name"].decode(errors="replace")
        if self._name == "file":
            self.filename = options.get(b"filename", b"").decode(errors="replace") or "file"
        elif self._name not in self._names:
            raise refused(self._name, f"file, {', '.join(self._names)}", "another field")

    def _add(self, data: bytes) -> None:
        if self._name == "file":
            if self._pieces.size + len(data) > self._room:
                raise HTTPException(413, f"the file is larger than {self._room} bytes.")
            self._pieces.add(data)
            return
        self.fields[self._name] = self.fields.get(self._name, "") + data.decode(errors="replace")
        if len(self.fields[self._name]) > MAX_FIELD:
            raise refused(self._name, f"at most {MAX_FIELD} characters", "more")

    def _end(self) -> None:
        self._ended = True
