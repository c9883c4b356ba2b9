"""The promises of every store, shown on all of them; S3 is a real server over HTTP."""

import os
import signal
import socketserver
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import repeat
from pathlib import Path
from typing import Any

import boto3
import pytest

from loramux_shared.bundle.deployments import read_pointer
from loramux_shared.bundle.generation import current_key
from loramux_shared.bundle.manifest import sha256_hex
from loramux_shared.faults import RecordTooLarge, SettingsInvalid, StoreUnavailable
from loramux_shared.storage import base as bounds
from loramux_shared.storage.base import ObjectMissing, Store, bound_of, read_bounded
from loramux_shared.storage.local import LocalStore
from loramux_shared.storage.open import open_store
from loramux_shared.storage.s3 import PART_BYTES, S3Store
from tests.support.http_server import serve_http
from tests.support.s3_gateway import S3Server, free_port
from tests.support.waiting import BOUND_S, wait_until

MIB = 1 << 20


def test_bytes_come_back(store: Store, tmp_path: Path) -> None:
    """Get returns the bytes that were put last under a key, empty ones and those of a file included."""
    file = tmp_path / "file"
    file.write_bytes(b"content of a file")
    store.put("a/b/c", b"\x00\xff bytes that are many")
    for content in (b"\x00\xff bytes", b"", file):
        store.put("a/b/c", content)
        assert store.get("a/b/c") == (file.read_bytes() if content is file else content)
    assert file.read_bytes() == b"content of a file"


def test_digests(store: Store) -> None:
    """A digest is that of the returned bytes; a path beside, above or below an object has no digest."""
    store.put("a/b", b"x" * 300_000)
    store.put("a/bc", b"")
    assert store.sha256("a/b") == sha256_hex(store.get("a/b"))
    assert store.sha256("a/bc") == sha256_hex(b"")
    for key in ("a", "a/c", "a/b/c", "other"):
        assert store.sha256(key) is None
        with pytest.raises(ObjectMissing, match=f"{store.uri}.*'{key}'"):
            store.get(key)


def test_list_is_in_order(store: Store) -> None:
    """Keys are in the order of whole keys; a prefix is the beginning of a key, within a folder too."""
    keys = sorted(["B", "a-b/1", "a.b/2", "a/1", "a/b/c", "a/b/d", "a/bc", "ab", "z:1", "zé"])
    for key in reversed(keys):
        store.put(key, b"")
    for prefix in ("", "a", "a/b", "a/b/", "a/b/c", "nothing/"):
        assert list(store.list(prefix)) == [key for key in keys if key.startswith(prefix)]


def test_delete(store: Store) -> None:
    """A deleted object is gone, its neighbours stay, and deleting nothing is no error."""
    store.put("a/b", b"x")
    store.put("a/c", b"y")
    store.delete("a/b")
    store.delete("a/b")
    store.delete("never/there")
    assert store.sha256("a/b") is None
    assert list(store.list("")) == ["a/c"]


def test_concurrent_puts_do_not_mix(store: Store) -> None:
    """Readers beside several writers of one key always see one writer's whole object."""
    # The gateway may send one object's length with the next one's bytes, which cuts a longer one short
    # (19 of 1600 reads; S3 does not): equal lengths there.
    longer = 0 if isinstance(store, S3Store) else 1000
    objects = [bytes([number]) * (256 * 1024 + number * longer) for number in range(4)]
    store.put("k", objects[0])
    with ThreadPoolExecutor(8) as pool:
        writers = [pool.submit(store.put, "k", data) for _ in range(5) for data in objects]
        readers = [pool.submit(store.get, "k") for _ in range(40)]
        for writer in writers:
            writer.result()
        assert all(reader.result() in objects for reader in readers)
    assert list(store.list("")) == ["k"]


def test_a_taken_file_is_gone_and_stored(store: Store, tmp_path: Path) -> None:
    """Take stores a file's content under a key, replaces an older object, and removes the file, however old."""
    for content, folder in ((b"first", tmp_path), (b"the second one", Path("/dev/shm"))):  # noqa: S108 - another disk
        file = folder / f"taken-{os.getpid()}"
        file.write_bytes(content)
        os.utime(file, (0, 0))
        store.take("a/file", file)
        assert store.get("a/file") == content
        assert not file.exists()
        assert next(iter(store.entries("a/"))).modified.year > 1970
    with pytest.raises(OSError, match="No such file"):
        store.take("a/file", tmp_path / "file")
    assert store.get("a/file") == b"the second one"


def test_entries_have_size_and_age(store: Store) -> None:
    """Entries are the listing with sizes and times, which are those of the last put."""
    begin = datetime.now(UTC) - timedelta(seconds=2)  # S3 tells whole seconds
    store.put("a/b", b"12345")
    store.put("a/c", b"")
    store.put("b", b"1")
    found = list(store.entries("a/"))
    assert [(entry.key, entry.size) for entry in found] == [("a/b", 5), ("a/c", 0)]
    assert all(begin <= entry.modified <= datetime.now(UTC) + timedelta(seconds=2) for entry in found)
    assert list(store.entries("nothing/")) == []


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_key_cannot_leave_the_store(kind: str, tmp_path: Path, aws: S3Server) -> None:
    """A key with empty, '.' or '..' parts is refused by every method before anything is touched."""
    store: Store = LocalStore(tmp_path / "store") if kind == "local" else S3Store("never-made")
    for call in (store.get, store.sha256, store.delete, lambda key: store.put(key, b"x")):
        for key in ("", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", ".", "a\n", "a\0"):
            with pytest.raises(ValueError, match="is not a valid key"):
                call(key)
    assert list(tmp_path.iterdir()) == []


def test_killed_put_leaves_nothing(tmp_path: Path) -> None:
    """A process killed in the middle of a put leaves the old object, and no new key."""
    store = LocalStore(tmp_path / "store")
    store.put("old", b"old")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = "import sys, pathlib as p; from loramux_shared.storage.local import LocalStore as S; "
    code += "S(p.Path(sys.argv[1])).put(sys.argv[2], p.Path(sys.argv[3]))"
    for key in ("old", "new/key"):
        command = [sys.executable, "-c", code, str(tmp_path / "store"), key, str(pipe)]
        writer = subprocess.Popen(command)
        with pipe.open("wb") as source:
            source.write(b"x" * 4 * MIB)
            wait_until(lambda: any(f.stat().st_size for f in (tmp_path / "store/.tmp").iterdir()), "a part")
            writer.send_signal(signal.SIGKILL)
            assert writer.wait(BOUND_S) == -signal.SIGKILL
        assert store.get("old") == b"old"
        assert store.sha256("new/key") is None
        assert list(store.list("")) == ["old"]
        [leftover] = (tmp_path / "store/.tmp").iterdir()
        LocalStore(tmp_path / "store")
        assert leftover.exists()  # another process may be writing it
        os.utime(leftover, (0, 0))
        LocalStore(tmp_path / "store")
        assert not leftover.exists()


def test_failed_put_leaves_nothing(tmp_path: Path) -> None:
    """A full disk is StoreUnavailable with the system's words; nothing stays behind."""
    script = (
        "import pathlib, resource, signal, sys\n"
        "from loramux_shared.storage.local import LocalStore\n"
        "from loramux_shared.faults import StoreUnavailable\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "store = LocalStore(pathlib.Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    store.put('a/b', b'x' * 5000)\n"
        "except StoreUnavailable as fault:\n    print(fault)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert output.startswith(f"file://{tmp_path}: cannot write 'a/b': File too large.")
    assert list(LocalStore(tmp_path).list("")) == []
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_links_are_not_followed(tmp_path: Path) -> None:
    """The store follows no linked file or folder to content outside of its root."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_bytes(b"secret")
    store = LocalStore(tmp_path / "store")
    store.put("a/b", b"x")
    (tmp_path / "store/a/file").symlink_to(tmp_path / "outside/secret")
    (tmp_path / "store/folder").symlink_to(tmp_path / "outside")
    for call in (store.get, store.sha256, store.delete, lambda key: store.put(key, b"x")):
        for key in ("a/file", "folder/secret"):
            with pytest.raises(StoreUnavailable, match="goes through a link"):
                call(key)
    assert list(store.list("")) == ["a/b"]
    assert (tmp_path / "outside/secret").read_bytes() == b"secret"


def test_a_linked_root_is_followed(tmp_path: Path) -> None:
    """The root itself may be a link: the operator named it."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    LocalStore(tmp_path / "link").put("a", b"x")
    assert (tmp_path / "real/a").read_bytes() == b"x"


def test_large_objects_go_in_parts(aws: S3Server, tmp_path: Path) -> None:
    """A file above the part size is uploaded in parts and comes back byte for byte; a smaller one is whole."""
    bucket, file = aws.new_bucket(), tmp_path / "large"
    store = S3Store(bucket)
    file.write_bytes(os.urandom(PART_BYTES + 9))
    store.put("large", file)
    store.put("small", b"x")
    assert store.get("large") == file.read_bytes()
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
    handler = type("Handler", (_Answers,), {"head": head.encode(), "bodies": staticmethod(bodies)})
    with serve_http(socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler)) as address:
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


def test_addresses(aws: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three forms of an address open the same store, whose own address is canonical."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_store("file:///srv/store").uri == "file:///srv/store"
    assert open_store("file://~/store").uri == f"file://{tmp_path}/store"
    assert open_store("s3://bucket").uri == open_store("s3://bucket/").uri == "s3://bucket"
    assert open_store("s3://bucket/a/b/").uri == "s3://bucket/a/b"


@pytest.mark.parametrize(
    "uri",
    [
        *("", "/srv/store", "file://srv/store", "file://~root", "gs://bucket", "memory://", "s3://", "s3:///a"),
        *("s3://bucket/a//b", "s3://bucket/../b", "s3://bucket/a?region=x", "s3://b cket", "S3://bucket"),
    ],
)
def test_other_addresses_are_refused(uri: str) -> None:
    """Any other address is SettingsInvalid, which shows it and the forms that are allowed."""
    with pytest.raises(SettingsInvalid) as caught:
        open_store(uri)
    assert f"store {uri!r}: expected s3://BUCKET/PREFIX, file:///DIR" in str(caught.value)


def test_an_endpoint_that_is_no_address(aws: S3Server) -> None:
    """An endpoint without a scheme is SettingsInvalid, which names the variable."""
    with pytest.raises(SettingsInvalid, match="Set AWS_ENDPOINT_URL_S3"):
        open_store("s3://bucket", s3_endpoint_url="localhost:9000")


def test_local_stores_need_no_boto3() -> None:
    """boto3 is not imported for a store in a folder."""
    code = "import sys; from loramux_shared.storage.open import open_store; open_store('file:///tmp/none')"
    code += "; print('boto3' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output == "False\n"


def test_an_object_beyond_its_bound_is_not_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of the bound is read; a larger one is an error that says its key, its size and the bound."""
    pointer = "deployments/d/current.json"
    store.put(pointer, b"x" * bound_of(pointer))
    assert len(store.get(pointer)) == bound_of(pointer) == 4096
    store.put("b/file", b"")
    assert store.get("b/file", 0) == b""
    store.put("b/file", b"0123456789")
    assert store.get("b/file", 10) == b"0123456789"
    with pytest.raises(RecordTooLarge, match=r"b/file: expected at most 9 bytes, found 10\."):
        store.get("b/file", 9)
    with pytest.raises(RecordTooLarge, match=f"{pointer}: expected at most 4096 bytes, found 4097"):
        store.put(pointer, b"x" * 4097)
    with monkeypatch.context() as patched:
        patched.setattr(bounds, "_KINDS", ())
        store.put(pointer, b"x" * 5000)
    with pytest.raises(RecordTooLarge, match=f"{pointer}: expected at most 4096 bytes, found 5000"):
        store.get(pointer)


def test_a_listing_beyond_its_bound_is_not_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing of as many keys as the bound is read; one more is an error with the prefix and the bound."""
    monkeypatch.setattr(bounds, "KEYS", 3)
    for name in "abc":
        store.put(f"k/{name}", b"")
    assert len(list(store.list("k/"))) == len(list(store.entries("k/"))) == 3
    store.put("k/d", b"")
    for listing in (store.list, store.entries):
        with pytest.raises(RecordTooLarge, match="expected at most 3 keys below 'k/', found more"):
            list(listing("k/"))


def test_a_large_pointer_costs_no_memory(tmp_path: Path) -> None:
    """A pointer of a gigabyte is not read, and of one that grows beyond its size only a piece is."""
    store = LocalStore(tmp_path)
    path = tmp_path / current_key("tiny")
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(1 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(RecordTooLarge, match=f"found {1 << 30}"):
            read_pointer(store, "tiny")
        with pytest.raises(RecordTooLarge, match="found more than 4096"), path.open("rb", buffering=0) as file:
            read_bounded(store.uri, "k", file.read, 4096, 0)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found", "503 Slow Down"])
def test_a_server_that_sends_without_end(aws: S3Server, status: str) -> None:
    """Objects, listings and errors of a server that lies about their size are read up to their bounds."""
    with _answering(status, lambda _: repeat(b" " * MIB)) as (_, store):
        calls = (lambda: store.get(current_key("d")), lambda: list(store.list("")), lambda: store.put("k", b""))
        for call in calls:
            with pytest.raises(RecordTooLarge, match="expected at most"):
                call()
