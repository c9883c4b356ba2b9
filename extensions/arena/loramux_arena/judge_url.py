"""A judge behind an OpenAI-compatible address, asked with what Python itself has."""

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import IO, Any, Final
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from loramux.records import Message
from loramux_arena.judge import LETTERS, NoVerdict, letter_in
from loramux_shared.faults import (
    Fault,
    ModelNotFound,
    PermissionDenied,
    RateLimited,
    RequestInvalid,
    ServerUnavailable,
    SettingsInvalid,
    Unauthenticated,
)
from loramux_shared.untrusted_json import parse_json
from loramux_shared.wording import is_whole

API_KEY: Final = "LORAMUX_JUDGE_API_KEY"
"""The judge's own; the key of the server that is compared is shown to nobody else."""
TIMEOUT_S: Final = 120.0
MOST_BYTES: Final = 2**20
TOKENS: Final = 1024
"""A model that thinks first needs more than the letter."""
_FORMAT: Final[Mapping[str, Any]] = {
    "type": "json_schema",
    "json_schema": {
        "name": "verdict",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"verdict": {"type": "string", "enum": list(LETTERS)}},
            "required": ["verdict"],
            "additionalProperties": False,
        },
    },
}
_KINDS: Final[Mapping[int, type[Fault]]] = {
    401: Unauthenticated,
    403: PermissionDenied,
    404: ModelNotFound,
    408: ServerUnavailable,
    429: RateLimited,
}


class _NoRedirect(HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(
        self,
        req: Request,  # noqa: ARG002 - the signature is Python's
        fp: IO[bytes],  # noqa: ARG002
        code: int,  # noqa: ARG002
        msg: str,  # noqa: ARG002
        headers: Any,  # noqa: ARG002
        newurl: str,  # noqa: ARG002
    ) -> Request | None:
        """Follow none."""
        return None


class UrlJudge:
    """``POST URL/chat/completions`` with a response format that leaves nothing but a letter."""

    digest = ""

    def __init__(self, url: str, model: str, api_key: str | None = None) -> None:
        """Take an address as OpenAI's clients have it, which ends with /v1 as a rule.

        Raises:
            SettingsInvalid: it is no address of http or https, or it holds a name or password.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise SettingsInvalid(
                f"--judge-url: expected http://HOST:PORT/v1 or https://HOST/v1 without a name or password; "
                f"a key stands in {API_KEY}"
            )
        self._url = url.rstrip("/") + "/chat/completions"
        self._host = parts.netloc
        self._model = model
        self._key = os.environ.get(API_KEY, "").strip() if api_key is None else api_key
        self._opener = build_opener(_NoRedirect)
        self.name = f"{model} at {parts.netloc}"

    async def letter(self, messages: Sequence[Message]) -> str:
        """Ask the judge, greedily, on a thread that blocks no other request."""
        return await asyncio.to_thread(self._ask, messages)

    def _ask(self, messages: Sequence[Message]) -> str:
        body: dict[str, Any] = {"model": self._model, "messages": messages, "response_format": _FORMAT}
        body |= {"temperature": 0, "max_tokens": TOKENS}
        headers = {"content-type": "application/json", "user-agent": "loramux"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        request = Request(self._url, json.dumps(body).encode(), headers)  # noqa: S310 - its scheme was looked at
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as response:
                answer = response.read(MOST_BYTES)
        except HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except (URLError, HTTPException, OSError) as error:
            why = getattr(error, "reason", error)
            raise ServerUnavailable(f"no answer from the judge at {self._host}: {why}") from error
        return _verdict(answer)

    def _refusal(self, error: HTTPError) -> Fault:
        detail = " ".join(error.read(2000).decode("utf-8", "replace").split())[:200]
        kind = _KINDS.get(error.code, ServerUnavailable if error.code >= 500 else RequestInvalid)
        after = error.headers.get("retry-after", "")
        wait_s = float(after) if is_whole(after) else None
        message = f"the judge at {self._host} answered {error.code}: {detail}"
        if kind in (Unauthenticated, PermissionDenied):
            message += f". Its key is to stand in {API_KEY}, apart from the server's."
        return kind(message, retry_after_s=wait_s)


def _verdict(answer: bytes) -> str:
    """Return the letter of an answer of OpenAI's API: in JSON as it was asked for, or bare."""
    try:
        content = parse_json(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise NoVerdict("the judge's answer has no choices[0].message.content") from None
    try:
        found = parse_json(content)["verdict"]
    except (ValueError, KeyError, TypeError, AttributeError):
        found = content
    return letter_in(str(found))
