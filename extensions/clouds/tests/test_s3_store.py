"""Stores in S3, on a real server over HTTP; the promises of every store are in tests/contract/storage."""

import socketserver
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import repeat
from typing import Any

import boto3
import pytest

from loramux_clouds.s3_store import PART_BYTES, S3Store
from loramux_shared.bundle.generation import current_key
from loramux_shared.faults import RecordTooLarge, SettingsInvalid, StoreUnavailable
from loramux_shared.storage.open import open_store
from tests.contract.storage.test_storage import refuse_bad_keys
from tests.support.https_server import served
from tests.support.s3_gateway import S3Server, free_port

MIB = 1 << 20


def test_a_key_cannot_leave_the_store(aws: S3Server) -> None:
    """A bad key is refused before the server is asked."""
    refuse_bad_keys(S3Store("never-made"))


def test_large_objects_go_in_parts(aws: S3Server) -> None:
    """An object above the part size is uploaded in parts, a smaller one is not."""
    bucket = aws.new_bucket()
    store = S3Store(bucket)
    store.put("large", b"x" * (PART_BYTES + 1))
    store.put("small", b"x")
    tags = {key: aws.client().head_object(Bucket=bucket, Key=key)["ETag"] for key in ("large", "small")}
    assert tags["large"].endswith('-2"')
    assert "-" not in tags["small"]


def test_prefixes_separate_stores(aws: S3Server) -> None:
    """Two stores in one bucket do not see each other, though one prefix begins like the other."""
    bucket = aws.new_bucket()
    one, other = open_store(f"s3://{bucket}/p"), open_store(f"s3://{bucket}/p2/")
    one.put("k", b"1")
    other.put("k", b"2")
    assert (one.get("k"), other.get("k")) == (b"1", b"2")
    assert list(one.list("")) == list(other.list("")) == ["k"]
    assert sorted(S3Store(bucket).list("")) == ["p/k", "p2/k"]
    assert (one.uri, other.uri) == (f"s3://{bucket}/p", f"s3://{bucket}/p2")


def test_long_lists_have_all_pages(aws: S3Server) -> None:
    """Keys beyond the first page, here of ten and usually of a thousand, are all listed, in order."""
    client, query = boto3.client("s3"), []

    def tens(params: dict[str, Any], **_: Any) -> dict[str, Any]:
        query.append(params)
        return params | {"MaxKeys": 10}

    client.meta.events.register("provide-client-params.s3.ListObjectsV2", tens)
    store = S3Store(aws.new_bucket(), client=client)
    keys = [f"k/{number:04d}" for number in range(35)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    assert list(store.list("k/")) == keys
    assert len(query) == 4


CREDENTIALS = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"


@pytest.mark.parametrize(
    ("variables", "bucket", "expected"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, "", r"AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "other"}, "", "Check AWS_ACCESS_KEY_ID"),
        (dict.fromkeys(CREDENTIALS), "bucket", r"no credentials\. Set AWS_"),
        ({}, "no-such-bucket", "bucket 'no-such-bucket' does not exist at {endpoint}"),
    ],
    ids=["a wrong secret", "an unknown key", "no credentials", "a missing bucket"],
)
def test_every_call_names_what_is_wrong(
    aws: S3Server, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str | None], bucket: str, expected: str
) -> None:
    """Each is a fault of the store in one line, with the variable to correct, and repeats no secret."""
    for name, value in variables.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    store = S3Store(bucket or aws.new_bucket())
    for call in (
        lambda: store.get("k"),
        lambda: store.put("k", b"x"),
        lambda: store.sha256("k"),
        lambda: list(store.list("")),
        lambda: store.delete("k"),
    ):
        with pytest.raises(StoreUnavailable, match=expected.format(endpoint=aws.endpoint)) as caught:
            call()
        line = str(caught.value)
        assert "\n" not in line
        assert line.startswith(f"{store.uri}: ")
        assert "not-the-secret" not in line
        assert aws.secret_key not in line
        assert bucket or aws.endpoint in line


def test_missing_profile(aws: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing profile is reported when the store is opened."""
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreUnavailable, match=r"^s3://bucket: .*Check AWS_PROFILE"):
        S3Store("bucket")


def test_server_down(aws: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not answer is StoreUnavailable, which names its address."""
    endpoint = f"http://127.0.0.1:{free_port()}"
    store = S3Store("bucket", endpoint_url=endpoint)
    with pytest.raises(StoreUnavailable, match=f"cannot connect to {endpoint}. Check AWS_ENDPOINT_URL_S3"):
        store.get("k")


class _Answers(socketserver.StreamRequestHandler):
    """Answers with a head and a body, which may have no end."""

    answers = 0
    head = b"200 OK"
    bodies: Callable[[int], Iterable[bytes]]
    """Pieces of a body, by the number of the answer."""

    def handle(self) -> None:
        while self.rfile.readline().strip():
            pass
        type(self).answers += 1
        self.wfile.write(b"HTTP/1.1 " + self.head + b"\r\nConnection: close\r\n\r\n")
        with suppress(ConnectionError):
            for piece in type(self).bodies(self.answers):
                self.wfile.write(piece)


@contextmanager
def _answering(head: str, bodies: Callable[[int], Iterable[bytes]]) -> Iterator[tuple[type[_Answers], S3Store]]:
    """A server of our own, and a store there."""
    handler = type("Handler", (_Answers,), {"head": head.encode(), "bodies": staticmethod(bodies)})
    with served(socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler)) as address:
        yield handler, S3Store("bucket", endpoint_url=f"http://{address}")


@pytest.mark.parametrize("broken", [2, 100])
def test_a_broken_answer_is_asked_for_again(aws: S3Server, broken: int) -> None:
    """A body that breaks off twice is read at the third time, whole; one that always does is a fault then."""
    whole = b"0123456789"
    with _answering(
        "200 OK\r\nContent-Length: 10", lambda number: [whole[:3] if number <= broken else whole]
    ) as (handler, store):
        if broken == 2:
            assert store.get("k") == whole
        else:
            with pytest.raises(StoreUnavailable, match="broke off"):
                store.get("k")
        assert handler.answers == 3


def test_addresses(aws: S3Server) -> None:
    """A store's own address is canonical."""
    assert open_store("s3://bucket").uri == open_store("s3://bucket/").uri == "s3://bucket"
    assert open_store("s3://bucket/a/b/").uri == "s3://bucket/a/b"


def test_an_endpoint_that_is_no_address(aws: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint without a scheme is SettingsInvalid, which names the variable."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "localhost:9000")
    with pytest.raises(SettingsInvalid, match="Set AWS_ENDPOINT_URL_S3"):
        open_store("s3://bucket")


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found", "503 Slow Down"])
def test_a_server_that_sends_without_end(aws: S3Server, status: str) -> None:
    """Objects, listings and errors of a server that lies about their size are read up to their bounds."""
    with _answering(status, lambda _: repeat(b" " * MIB)) as (_, store):
        calls = (lambda: store.get(current_key("d")), lambda: list(store.list("")), lambda: store.put("k", b""))
        for call in calls:
            with pytest.raises(RecordTooLarge, match="expected at most"):
                call()
