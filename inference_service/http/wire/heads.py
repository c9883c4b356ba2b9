"""Which heads of requests are understood: those that two servers cannot read differently.

Source of the rules: RFC 9112, sections 2.2, 3.2, 6.1, 6.3 and 7.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

HOST: Final = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9\-._~%!$&'()*+,;=]*)(:[0-9]*)?")

TARGET: Final = re.compile(rb"(/|https?://[^/]|\*$)[^#]*$", re.IGNORECASE)


class Refused(ValueError):
    """A head that is not understood: a status, a code and a message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, code, message)
        self.problem = (status, code, message)


def check_head(version: str, url: bytes, headers: Iterable[tuple[bytes, bytes]], *, upgrades: bool) -> None:
    """Look at a request's version, target and header fields, with names in small letters.

    upgrades is true where it asks for another protocol.

    Raises:
        Refused: two servers could read it differently, or it asks for what is not spoken here.
    """
    if version not in ("1.0", "1.1"):
        raise Refused(505, "invalid_http", "HTTP/1.1 is spoken here.")
    if not TARGET.match(url):
        raise Refused(
            400, "invalid_http", "expected the target of the request as a path, or as http://HOST/PATH."
        )
    fields: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        fields.setdefault(name, []).append(value.strip(b" \t"))
    hosts = fields.get(b"host", [])
    if len(hosts) > 1 or (version == "1.1" and not hosts) or not all(map(HOST.fullmatch, hosts)):
        raise Refused(400, "invalid_http", "expected one valid Host header.")
    codings = fields.get(b"transfer-encoding", [])
    if codings and (version == "1.0" or b"content-length" in fields):
        raise Refused(400, "invalid_http", "Transfer-Encoding stands where it must not.")
    if codings and [each.lower() for each in codings] != [b"chunked"]:
        raise Refused(501, "invalid_http", "of transfer codings only `chunked` is taken, once.")
    if upgrades and (codings or fields.get(b"content-length", [b"0"]) != [b"0"]):
        # httptools takes what follows for another protocol, and would read the body as a request.
        raise Refused(501, "invalid_http", "with a body no Upgrade is served: speak HTTP/1.1 from the start.")
    if any(each.lower() != b"100-continue" for each in fields.get(b"expect", [])):
        raise Refused(417, "invalid_http", "of expectations only `100-continue` is met.")
