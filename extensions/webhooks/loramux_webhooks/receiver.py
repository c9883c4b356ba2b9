"""Events of Hugging Face's webhooks, and the updates that follow from them.

https://huggingface.co/docs/hub/webhooks: a POST with the secret in ``X-Webhook-Secret``, repeated until a 2xx.
"""

import hmac
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any, Final, Self
from uuid import uuid4

import structlog

from loramux.client import Client
from loramux.records import DeploymentState
from loramux_shared.bounded_server import BoundedHttpServer
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import Fault
from loramux_shared.rpc.options import listen
from loramux_shared.untrusted_json import JsonInvalid, parse_json
from loramux_shared.wording import is_whole

log = structlog.get_logger()

MAX_BODY: Final = 1 << 20
REQUEST_S: Final = 20.0
"""Seconds from a connection to the end of its request, which is its only one."""
STOP_S: Final = 20.0
"""Seconds for which the end waits for an update."""
MAX_CONNECTIONS: Final = 64
"""Connections that are open at once; above it the oldest one ends."""
MAX_DEBOUNCES: Final = 6
"""Debounce times for which an update waits while events go on."""
RETRY_S: Final = 30.0
"""Seconds before an update is repeated that the builder had no room or no store for."""
MAIN: Final = "main"
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


class Followed:
    """The adapters of a deployment file that follow a branch or tag of a repository on the hub."""

    def __init__(self, adapters: Mapping[str, Repository]) -> None:
        self.adapters = {
            name: each
            for name, each in adapters.items()
            if each.source is SourceKind.HF and not _COMMIT.fullmatch(each.revision)
        }

    def touched(self, event: Any) -> dict[str, Repository]:
        """Return the adapters that an event is about; an event without refs is about all of a repository."""
        if not isinstance(event, dict):
            return {}
        about, repo, refs = (event.get(key) for key in ("event", "repo", "updatedRefs"))
        if not isinstance(about, dict) or not str(about.get("scope", "")).startswith("repo.content"):
            return {}
        name = str(repo.get("name", "")) if isinstance(repo, dict) else ""
        changed = None
        if isinstance(refs, list) and refs:
            changed = {_short(str(each.get("ref", ""))) for each in refs if isinstance(each, dict)}
        return {
            adapter: each
            for adapter, each in self.adapters.items()
            if each.repo.casefold() == name.casefold()
            and (changed is None or _short(each.revision or MAIN) in changed)
        }


@dataclass(frozen=True)
class _Due:
    """The time of an adapter's next update."""

    at_s: float
    latest_s: float
    """Time after which events no longer postpone it."""
    repository: Repository


def _short(ref: str) -> str:
    """Return the name of a branch or tag, and of a pull request, which is neither, refs/pr/N."""
    return re.sub("^refs/(heads|tags)/", "", ref)


class Updates:
    """Updates of a deployment's adapters, each after its last event was some seconds ago; in one thread.

    An adapter whose events go on is updated after MAX_DEBOUNCES times as long.
    """

    def __init__(
        self,
        client: Client,
        deployment: str,
        debounce_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._deployment = deployment
        self._debounce_s = debounce_s
        self._clock = clock
        self._due: dict[str, _Due] = {}
        self._news = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="updates", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._news:
            self._ended = True
            self._news.notify()
        self._thread.join(STOP_S)

    def note(self, adapters: Mapping[str, Repository], after_s: float | None = None) -> None:
        """Have adapters updated once they were quiet for the time."""
        now, quiet_s = self._clock(), self._debounce_s if after_s is None else after_s
        with self._news:
            for name, repository in adapters.items():
                earlier = self._due.get(name)
                latest_s = earlier.latest_s if earlier else now + max(quiet_s, MAX_DEBOUNCES * self._debounce_s)
                self._due[name] = _Due(min(now + quiet_s, latest_s), latest_s, repository)
            self._news.notify()

    def take(self) -> dict[str, Repository]:
        """Return the adapters whose time has come, which are no longer noted."""
        now = self._clock()
        with self._news:
            found = {name: due.repository for name, due in self._due.items() if due.at_s <= now}
            for name in found:
                del self._due[name]
        return found

    def publish(self, adapters: Mapping[str, Repository]) -> None:
        """Update adapters, and return when that has ended; what fails for now is noted again.

        Each is an update of its own, so that one that is refused blocks no other: a builder makes one
        generation of those that wait.
        """
        begun = {}
        for name, repository in adapters.items():
            with self._trying(name, repository):
                call = uuid4().hex
                self._client.update(self._deployment, {name: repository}, request_id=call)
                begun[name] = call
        for name, call in begun.items():
            with self._trying(name, adapters[name]):
                *_, last = self._client.watch(self._deployment, request_id=call)
                if last.state is DeploymentState.FAILED and last.failure is not None:
                    raise last.failure
                log.info("adapter updated", adapter=name, generation=last.generation)

    @contextmanager
    def _trying(self, name: str, repository: Repository) -> Iterator[None]:
        """Report a fault of an adapter's update, and note one that may pass again."""
        try:
            yield
        except Fault as fault:
            log.warning("adapter not updated", adapter=name, reason=fault.reason, problem=str(fault))
            if fault.is_passing:
                self.note({name: repository}, RETRY_S)

    def _run(self) -> None:
        while not self._ended:
            if adapters := self.take():
                self.publish(adapters)
                continue
            with self._news:
                soonest = min((due.at_s for due in self._due.values()), default=None)
                if not self._ended:
                    self._news.wait(None if soonest is None else max(0.0, soonest - self._clock()))


class Receiver(BoundedHttpServer):
    """The address that a hub posts events to."""

    def __init__(
        self,
        address: str,
        secret: str,
        followed: Followed,
        updates: Updates,
        *,
        max_connections: int = MAX_CONNECTIONS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Listen on ``HOST:PORT``.

        Raises:
            SettingsInvalid: the address is in use, or not one of this machine.
        """
        listening = listen(address)
        super().__init__(
            listening.getsockname()[:2],
            _Handler,
            max_connections=max_connections,
            limit_s=REQUEST_S,
            listening=listening,
            clock=clock,
        )
        self._secret = secret.encode()
        self._followed = followed
        self._updates = updates

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what failed, but for clients that went away."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """Return where it listens."""
        return f"{self.server_address[0]!s}:{self.server_address[1]}"

    def take(self, secret: str, body: bytes) -> tuple[int, Collection[str]]:
        """Return the status for an event, and the adapters that it is about."""
        if not hmac.compare_digest(secret.encode("latin-1", "replace"), self._secret):  # as headers are read
            return 403, ()
        try:
            event = parse_json(body)
        except JsonInvalid:
            return 400, ()
        touched = self._followed.touched(event)
        if touched:
            self._updates.note(touched)
        return 202, touched


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        """Take an event."""
        length = self.headers.get("Content-Length", "")
        if not is_whole(length) or int(length) > MAX_BODY:
            return self._answer(413 if length.isdigit() else 411, ())
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            return self._answer(400, ())
        status, adapters = self.server.take(self.headers.get("X-Webhook-Secret", ""), body)
        return self._answer(status, adapters)

    def do_GET(self) -> None:
        """Answer probes."""
        self._answer(200, ())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Log nothing: updates are logged."""

    def _answer(self, status: int, adapters: Collection[str]) -> None:
        data = json.dumps({"adapters": sorted(adapters)}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
