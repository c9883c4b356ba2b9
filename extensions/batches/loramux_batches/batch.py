"""Batches in OpenAI's format: a file of requests in, a file of answers out, resumable.

Format: https://platform.openai.com/docs/guides/batch. A line of input has custom_id, method, url and body; a
line of output has id, custom_id, response (status_code, request_id, body) and error.
"""

import asyncio
import fcntl
import json
import random
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import httpx
from pydantic_core import from_json, to_json

from loramux_batches.records import URLS
from loramux_shared.faults import Finding, RequestInvalid, ServerUnavailable

AGAIN: Final = frozenset({408, 429, 502, 503, 504, 529})
"""Statuses that may be another one later: the request is sent again."""
ATTEMPTS: Final = 8
PAUSE_S: Final = 0.5
LONGEST_S: Final = 30.0
SEPARATORS: Final = {each: f"\\u{each:04x}" for each in (0x85, 0x2028, 0x2029)}
"""Ends of lines to many readers, which JSON does not escape."""
JSON: Final = {"content-type": "application/json"}
PREFIX: Final = "batch_req_"
HEAD: Final = f'{{"id": "{PREFIX}'.encode()
"""Beginning of a line of output."""
MAX_REPORTED: Final = 20
"""Wrong lines that are reported."""


@dataclass(frozen=True)
class BatchRequest:
    """One line of a batch."""

    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass
class Counts:
    """The numbers of a batch's requests."""

    total: int
    done: int = 0
    """Answered, also by runs before this one."""
    refused: int = 0
    """Answered with a status that is no success."""

    @property
    def left(self) -> int:
        """Requests without an answer; another run sends them again."""
        return self.total - self.done


class Batch:
    """A file of requests, and the file of their answers."""

    def __init__(
        self,
        source: Path,
        output: Path,
        pause_s: float = PAUSE_S,
        urls: Collection[str] = URLS,
        attempts: int | None = ATTEMPTS,
    ) -> None:
        """Check all requests, and read which of them are answered.

        pause_s is the pause before a second attempt; each pause is twice as long as the one before, at most
        `LONGEST_S`. Without a number of attempts, there is no last one.

        Raises:
            RequestInvalid: lines that are no requests, by their numbers; or an output that is no batch's.
            OSError: a file cannot be read.
        """
        self._source = source
        self._output = output
        self._pause_s = pause_s
        self._attempts = attempts
        self._ids = _checked(source, urls)
        self._resume()

    def _resume(self) -> None:
        answered, refused, self._length = _answered(self._output)
        self._done = answered & self._ids
        self.counts = Counts(len(self._ids), len(self._done), len(refused & self._ids))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs from the output until this one ends, however it ends.

        Raises:
            RequestInvalid: another run writes it.
        """
        self._output.parent.mkdir(parents=True, exist_ok=True)
        with self._output.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RequestInvalid(
                    f"another run-batch writes {self._output}: expected one run at a time. Wait for its end, "
                    "or choose another file."
                ) from None
            except OSError:
                pass  # a file system without locks
            if file.tell() != self._length:  # an earlier run wrote more, or its end
                self._resume()
            yield

    async def run(self, http: httpx.AsyncClient, concurrency: int, on_answer: Callable[[], None]) -> Counts:
        """Send what is not answered, as many at once; each answer is written when it comes.

        A request that finds no server, or a busy one, is sent again. Where all attempts were not enough, it
        stays unanswered; when that is so of as many in a row as are sent at once, the batch ends.
        """
        requests = self.unanswered()
        self._output.parent.mkdir(parents=True, exist_ok=True)
        counts, unanswered = self.counts, 0
        with self._output.open("ab", buffering=0) as file:
            file.truncate(self._length)

            async def work() -> None:
                nonlocal unanswered
                for request in requests:
                    answer = await self._ask(http, request)
                    unanswered = unanswered + 1 if answer is None else 0
                    if answer is not None:
                        _append(file, request, answer)
                        self._done.add(request.custom_id)
                        counts.done += 1
                        counts.refused += not answer.is_success
                        on_answer()
                    elif unanswered >= concurrency:
                        return

            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work())
        return counts

    def unanswered(self) -> Iterator[BatchRequest]:
        """Yield the requests that have no answer."""
        return (each for each in _requests(self._source) if each.custom_id not in self._done)

    async def _ask(self, http: httpx.AsyncClient, request: BatchRequest) -> httpx.Response | None:
        """Return the final answer, None where there was none."""
        body = to_json(request.body, inf_nan_mode="constants")  # 1e999 is infinite, and the API refuses it
        for attempt in count() if self._attempts is None else range(self._attempts):
            pause_s = min(LONGEST_S, self._pause_s * 2 ** min(attempt, ATTEMPTS)) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
            try:
                answer = await http.post(request.url, content=body, headers=JSON)
                if answer.status_code not in AGAIN:
                    return answer
                retry_after = answer.headers.get("retry-after", "")
                pause_s = min(LONGEST_S, max(pause_s, float(retry_after) if retry_after.isdecimal() else 0.0))
            except httpx.RequestError:
                pass
            if attempt + 1 != self._attempts:
                await asyncio.sleep(pause_s)
        return None


def _append(file: FileIO, request: BatchRequest, answer: httpx.Response) -> None:
    response = {
        "status_code": answer.status_code,
        "request_id": answer.headers.get("x-request-id", ""),
        "body": _body(answer),
    }
    line = memoryview(_line(request.custom_id, response, None))
    try:
        while line:
            line = line[file.write(line) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from error


def error_line(custom_id: str, code: str, message: str) -> bytes:
    """Return the line of output of a request that was not answered."""
    return _line(custom_id, None, {"code": code, "message": message})


def _line(custom_id: str, response: Any, error: Any) -> bytes:
    line = {
        "id": f"{PREFIX}{uuid4().hex}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(line, ensure_ascii=False).translate(SEPARATORS).encode() + b"\n"


def _body(answer: httpx.Response) -> Any:
    try:
        return _parsed(answer.content)
    except ValueError:  # a proxy's page
        return answer.content.decode(errors="replace")


def _requests(source: Path) -> Iterator[BatchRequest]:
    with source.open("rb") as lines:
        for line in lines:
            if line.strip():
                read = _parsed(line)
                yield BatchRequest(read["custom_id"], read["url"], read["body"])


def _parsed(line: bytes) -> Any:
    """Return what JSON says, read as strictly as the API reads a body, which a line of input becomes.

    Raises:
        ValueError: it is no JSON, or has what cannot be written as JSON again.
    """
    return from_json(line, allow_inf_nan=False)


def _checked(source: Path, urls: Collection[str]) -> set[str]:
    """Return the ids of all requests.

    Raises:
        RequestInvalid: lines that are no requests.
    """
    ids: set[str] = set()
    findings: list[Finding] = []
    with source.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip() or len(findings) == MAX_REPORTED:
                continue
            wrong = _wrong(line, ids, urls)
            if wrong is not None:
                where, expected, found = wrong
                findings.append(
                    Finding(
                        code="E_BAD_FIELD", where=f"line {number}{where}", expected=expected, found=found[:80]
                    )
                )
    if findings:
        raise RequestInvalid(f"{source} has lines that are no requests of a batch", findings)
    return ids


def _wrong(line: bytes, ids: set[str], urls: Collection[str]) -> tuple[str, str, str] | None:
    """Return which field of a line is wrong, what it should be and what it is; else add the line's id."""
    try:
        read = _parsed(line)
    except ValueError as error:
        return "", "a JSON object", f"no JSON: {error}"
    if not isinstance(read, dict):
        return "", "a JSON object", type(read).__name__
    custom_id, method, url, body = (read.get(name) for name in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        return ", custom_id", "a text that no other line has", repr(custom_id)
    if custom_id in ids:
        return ", custom_id", "a text that no other line has", repr(custom_id)
    if method != "POST":
        return ", method", "POST", repr(method)
    if url not in urls:
        return ", url", f"one of {', '.join(urls)}" if len(urls) > 1 else repr(*urls), repr(url)
    if not isinstance(body, dict):
        return ", body", "a JSON object", type(body).__name__
    if body.get("stream"):
        return ", body.stream", "false: an answer of a batch is one object", repr(body["stream"])
    ids.add(custom_id)
    return None


def _answered(output: Path) -> tuple[set[str], set[str], int]:
    """Return the answered ids, those that were refused, and the length of all whole lines.

    Raises:
        RequestInvalid: the file is no output of a batch.
    """
    answered: set[str] = set()
    refused: set[str] = set()
    length = 0
    if not output.exists():
        return answered, refused, 0
    with output.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n") and line[: len(HEAD)] == HEAD[: len(line)]:
                break  # a killed run left half a line, or all of it but its end
            try:
                read = from_json(line)
                custom_id, status = str(read["custom_id"]), int(read["response"]["status_code"])
            except (ValueError, LookupError, TypeError) as error:
                raise RequestInvalid(
                    f"{output} is no output of a batch: choose another file, or delete it."
                ) from error
            answered.add(custom_id)
            if not 200 <= status < 300:
                refused.add(custom_id)
            length += len(line)
    return answered, refused, length


def unanswered(counts: Counts, output: Path) -> ServerUnavailable:
    """Return the fault of a batch that has requests without an answer."""
    return ServerUnavailable(
        f"{counts.left} of {counts.total} requests have no answer: the server was busy or away "
        f"in {ATTEMPTS} attempts. "
        f"The other answers are in {output}. Run the command again when the server answers."
    )
