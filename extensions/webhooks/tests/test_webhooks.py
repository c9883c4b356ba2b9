"""Events of a hub become updates of the adapters that follow its repositories."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from loramux.cli.main import app
from loramux.client import Client
from loramux_shared.bundle.deployments import require_deployment
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import AdapterInvalid, StoreUnavailable
from loramux_webhooks.receiver import MAX_DEBOUNCES, REQUEST_S, RETRY_S, Followed, Receiver, Updates
from tests.support.http_server import serve_http
from tests.support.hub import HubRepo, serve_hub
from tests.support.openai_api import openai_world
from tests.support.services.operated_replicas import open_builder
from tests.support.waiting import BOUND_S, wait_until

SECRET = "a s\xe9cret"  # noqa: S105 - of a test


def hf(repo: str, revision: str = "") -> Repository:
    return Repository(source=SourceKind.HF, repo=repo, revision=revision)


FOLLOWED = Followed(
    {
        "main": hf("lab/a"),
        "tagged": hf("Lab/A", "v1"),
        "pinned": hf("lab/a", "0" * 40),
        "other": hf("lab/b"),
        "request": hf("lab/p", "refs/pr/3"),
        "named": hf("lab/p", "refs/heads/x"),
        "local": Repository(source=SourceKind.LOCAL, repo="/lab/a"),
    }
)


def event(repo: str = "lab/a", *refs: str, scope: str = "repo.content") -> dict[str, Any]:
    """An event of Hugging Face's webhooks."""
    updated = [{"ref": ref, "oldSha": "1" * 40, "newSha": "2" * 40} for ref in refs]
    return {"event": {"action": "update", "scope": scope}, "repo": {"name": repo}, "updatedRefs": updated}


@pytest.mark.parametrize(
    ("body", "touched"),
    [
        (event(), {"main", "tagged"}),
        (event("lab/a", "refs/heads/main"), {"main"}),
        (event("lab/a", "refs/tags/v1", "refs/pr/3"), {"tagged"}),
        (event("lab/a", "refs/pr/v1", "refs/pr/main"), set()),
        (event("lab/p", "refs/pr/3"), {"request"}),
        (event("lab/p", "refs/heads/3", "refs/heads/x"), {"named"}),
        (event("lab/b"), {"other"}),
        (event("lab/c"), set()),
        (event(scope="discussion"), set()),
        *(
            (nothing, set())
            for nothing in (None, [], {}, {"event": 1}, {"event": {"scope": "repo.content"}, "repo": 1})
        ),
    ],
)
def test_an_event_touches_the_adapters_that_follow_what_changed(body: Any, touched: set[str]) -> None:
    """Pinned commits and other sources follow nothing; a branch is told by its ref."""
    assert FOLLOWED.touched(body).keys() == touched


class Fake:
    """A client that fails as a test says, and notes updates."""

    def __init__(self, *faults: Exception) -> None:
        self.faults = list(faults)
        self.updates: list[list[str]] = []

    def update(self, deployment: str, adapters: Any, request_id: str) -> None:
        assert (deployment, bool(request_id)) == ("tiny", True)
        if self.faults:
            raise self.faults.pop(0)
        self.updates.append(sorted(adapters))

    def watch(self, deployment: str, request_id: str) -> Iterator[Any]:
        """Report the end of the build."""
        assert request_id
        return iter([type("Info", (), {"state": deployment, "failure": None, "generation": 2})])


def test_events_are_debounced_and_passing_failures_repeated() -> None:
    """Adapters that are quiet are due together; one that is refused waits for its next event."""
    time_s = [0.0]
    client = Fake(StoreUnavailable("down"), AdapterInvalid("no LoRA"))
    updates = Updates(client, "tiny", 10, clock=lambda: time_s[0])

    def due(after_s: float) -> list[str]:
        time_s[0] += after_s
        return sorted(updates.take())

    a, b = hf("lab/a"), hf("lab/b")
    updates.note({"a": a})
    assert due(6) == []
    updates.note({"a": a, "b": b})
    assert due(6) == []
    assert due(4) == ["a", "b"]
    updates.publish({"a": a})
    assert due(RETRY_S - 1) == []
    assert due(1) == ["a"]
    updates.publish({"a": a})
    assert due(2 * RETRY_S) == []
    updates.publish({"a": a, "b": b})
    assert client.updates == [["a"], ["b"]]


def test_events_without_end_postpone_an_update_so_long() -> None:
    """An update is due after MAX_DEBOUNCES debounce times, with the newest repository; so is the next one."""
    time_s = [0.0]
    updates = Updates(Fake(), "tiny", 10, clock=lambda: time_s[0])
    due = []
    while time_s[0] < 2.5 * MAX_DEBOUNCES * 10:
        updates.note({"a": hf("lab/a", f"v{time_s[0]:g}")})
        time_s[0] += 5
        due += [(time_s[0], each.revision) for each in updates.take().values()]
    assert due == [(60, "v55"), (120, "v115")]


@pytest.fixture
def receiver() -> Iterator[tuple[str, Updates]]:
    """A receiver whose updates nobody takes."""
    updates = Updates(Fake(), "tiny", 0)
    with serve_http(Receiver("127.0.0.1:0", SECRET, FOLLOWED, updates)) as address:
        yield f"http://{address}", updates


def test_an_event_needs_the_secret_and_a_bounded_body(receiver: tuple[str, Updates]) -> None:
    """Nothing follows from other requests."""
    url, updates = receiver
    headers = {"X-Webhook-Secret": SECRET.encode()}
    for status, kwargs in (
        (403, {"json": event()}),
        (403, {"json": event(), "headers": {"X-Webhook-Secret": "other"}}),
        (400, {"content": b"{", "headers": headers}),
        (413, {"content": b" " * ((1 << 20) + 1), "headers": headers}),
        (411, {"content": iter([b"{}"]), "headers": headers}),
    ):
        assert httpx.post(url, **kwargs, timeout=BOUND_S).status_code == status
    assert updates.take() == {}
    answer = httpx.post(url, json=event(), headers=headers, timeout=BOUND_S)
    assert (answer.status_code, answer.json()) == (202, {"adapters": ["main", "tagged"]})
    assert updates.take().keys() == {"main", "tagged"}
    assert httpx.get(url, timeout=BOUND_S).status_code == 200


def test_connections_that_say_nothing_leave_for_new_ones() -> None:
    """There are as many threads as places, and an event is taken behind any number of silent connections."""
    receiver = Receiver("127.0.0.1:0", SECRET, FOLLOWED, Updates(Fake(), "tiny", 0), max_connections=2)
    before = threading.active_count()
    with serve_http(receiver) as address:
        host, port = address.split(":")
        silent = [socket.create_connection((host, int(port)), BOUND_S) for _ in range(20)]
        answer = httpx.get(f"http://{address}", timeout=BOUND_S)
        assert (answer.status_code, receiver.connections <= 2) == (200, True)
        wait_until(lambda: threading.active_count() <= before + 1 + 2, "the end of other threads")
        assert [each.recv(1) for each in silent[:-1]] == [b""] * 19
        for each in silent:
            each.close()


@pytest.mark.parametrize(
    "sent", ["", "POST / HTTP/1.1\r\nhost: a", "POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\n{"]
)
def test_a_request_has_its_time_alone(sent: str) -> None:
    """However its bytes drip in, its connection ends when that is over."""
    time_s = [0.0]
    updates = Updates(Fake(), "tiny", 0)
    receiver = Receiver("127.0.0.1:0", SECRET, FOLLOWED, updates, clock=lambda: time_s[0])
    with serve_http(receiver) as address:
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), BOUND_S) as drip:
            drip.sendall(sent.encode())
            wait_until(lambda: receiver.connections == 1, "the connection")
            time_s[0] = REQUEST_S - 1
            receiver.service_actions()
            drip.sendall(b" ")
            assert receiver.connections == 1
            time_s[0] = REQUEST_S
            assert drip.recv(1) == b""
        wait_until(lambda: not receiver.connections, "the end of the connection")


async def test_a_push_to_a_hub_is_served(tmp_path: Path) -> None:
    """The adapter's next version is the new commit, whatever is refused at the same moment."""
    world = openai_world(tmp_path / "world")
    folders = [*world[0].adapters.values()]
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders[:2])
    with serve_hub() as hub:
        hub.repos["lab/a"] = HubRepo({"main": "a" * 40}, first)
        async with open_builder(world, tmp_path / "work", hub_endpoint=hub.endpoint) as builder:
            followed = Followed({"hooked": hf("lab/a")})

            def run() -> None:
                with Client(builder=builder) as client, Updates(client, "tiny", 0) as updates:
                    digests = []
                    for commit, files in (("a" * 40, first), ("b" * 40, second)):
                        hub.repos["lab/a"] = HubRepo({"main": commit}, files)
                        updates.note(followed.touched(event()) | {"absent": hf("lab/absent")})
                        found = wait_until(lambda commit=commit: digest_at(commit), "the new version")
                        digests.append(found)
                    assert digests[0] != digests[1]

            def digest_at(commit: str) -> str:
                record = require_deployment(world[1], "tiny").adapters.get("hooked")
                return record.digest if record is not None and record.source.revision == commit else ""

            await asyncio.to_thread(run)


def test_a_file_without_anything_to_follow_is_refused(tmp_path: Path) -> None:
    """The command says what it expected."""
    file = tmp_path / "deployment.yaml"
    file.write_text("model_name: tiny\nbuild:\n  checkpoint_repository: {source: HF, repo: lab/base}\n")
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    found = CliRunner().invoke(app, ["webhooks", str(file), "--secret-file", str(secret)])
    assert (found.exit_code, "expected an adapter of source HF" in found.stderr) == (2, True)
