import base64
import hashlib
from collections.abc import Iterator

import pytest

from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import BundleCorrupt, RepoNotFound, SourceRefused, SourceUnavailable
from loramux_shared.sources import retry
from loramux_shared.sources.base import MAX_BYTES, MAX_FILES, Resolved, SourceFile
from loramux_shared.sources.bucket import BucketSource, md5_of
from loramux_shared.sources.retry import Busy, RetryPolicy
from loramux_shared.sources.secrets import Secrets
from tests.support.waiting import OwnTime

REPO = Repository(source=SourceKind.S3, repo="s3://bucket/one")
QUICK = RetryPolicy(attempts=3, wait_s=0.01)


class FakeBucket:
    """A bucket in memory whose reads fail as often as wanted."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.reads = 0
        self.failures: list[SourceUnavailable] = []

    def list(self, prefix: str) -> Iterator[tuple[str, SourceFile]]:
        if self.failures:
            raise self.failures.pop()
        for name, data in self.files.items():
            yield prefix + name, SourceFile(len(data), version="1")

    def read(self, key: str, version: str) -> Iterator[bytes]:
        """Yield a file in two pieces, the second of which may fail."""
        assert version == "1"
        self.reads += 1
        data = self.files[key.rpartition("one/")[2]]
        yield data[:2]
        if self.failures:
            raise self.failures.pop()
        yield data[2:]

    def close(self) -> None:
        """Nothing is open."""


def source(bucket: FakeBucket, patience: RetryPolicy = QUICK) -> BucketSource:
    return BucketSource(lambda _repository, _secrets: (bucket, "/one/"), Secrets(None, {}), patience)


def listed(**sizes: int) -> Resolved:
    """A listing that may not be true."""
    return Resolved(REPO, {name: SourceFile(size, version="1") for name, size in sizes.items()})


def test_a_broken_transfer_begins_again(tmp_path):
    """Bytes of a broken transfer are not kept, and the file is right in the end."""
    bucket = FakeBucket({"a": b"abcdef"})
    bucket.failures = [SourceUnavailable("x"), SourceUnavailable("y")]
    assert source(bucket).fetch(listed(a=6), ["a"], tmp_path)["a"].size == 6
    assert (tmp_path / "a").read_bytes() == b"abcdef"
    assert bucket.reads == 3


@pytest.mark.parametrize("size", [5, 7])
def test_files_have_their_size(size, tmp_path):
    """A file that has more or fewer bytes than its listing is not kept."""
    with pytest.raises(SourceUnavailable, match=rf"expected {size} bytes, found (more|6)"):
        source(FakeBucket({"a": b"abcdef"})).fetch(listed(a=size), ["a"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_checked_first(tmp_path):
    """A listing of more than any model has is not believed, and nothing is read."""
    bucket = FakeBucket({"a": b"abcdef"})
    with pytest.raises(SourceRefused, match=f"at most {MAX_BYTES}"):
        source(bucket).fetch(listed(a=MAX_BYTES + 1), ["a"], tmp_path)
    assert bucket.reads == 0
    many = FakeBucket({str(i): b"" for i in range(MAX_FILES + 1)})
    with pytest.raises(SourceRefused, match=f"more than {MAX_FILES} files"):
        source(many).resolve(REPO)


def test_a_source_says_when_to_come_back(monkeypatch):
    """``Retry-After`` is waited for; a wish that is longer than the patience is not."""
    bucket = FakeBucket({"a": b""})
    bucket.failures = [Busy.until("x", "0"), Busy.until("x", "nonsense")]
    assert source(bucket).resolve(REPO).files
    bucket.failures = [Busy.until("x", "3600")]
    monkeypatch.setattr(retry, "time", time := OwnTime())
    with pytest.raises(SourceUnavailable):
        source(bucket, RetryPolicy(answer_s=20)).resolve(REPO)
    assert time.now_s == 0
    bucket.failures = [Busy.until("x", "7")]
    assert source(bucket, RetryPolicy(answer_s=20)).resolve(REPO).files
    assert time.now_s == pytest.approx(7)


def test_a_slow_transfer_is_given_up(tmp_path, monkeypatch):
    """A transfer below the least rate ends at its deadline, whatever the attempts."""

    monkeypatch.setattr(retry, "time", time := OwnTime())

    class Slow(FakeBucket):
        def read(self, key: str, version: str) -> Iterator[bytes]:  # noqa: ARG002 - the port's
            for byte in self.files["a"]:
                time.sleep(2)
                yield bytes([byte])

    bucket = Slow({"a": bytes(1000)})
    with pytest.raises(SourceUnavailable, match="below the speed limit"):
        source(bucket, RetryPolicy(answer_s=100)).fetch(listed(a=1000), ["a"], tmp_path)
    assert time.now_s < 110


def test_the_cache_is_filled_with_what_it_lacks(tmp_path):
    """A file in the cache with the right size is not read again, and a missing object is reported."""
    bucket = FakeBucket({"a": b"abcdef", "b": b"xy"})
    one = source(bucket)
    files = one.digests(one.resolve(REPO), ["a", "b"])
    pinned = one.pin(one.resolve(REPO), files)
    folder = one.place(pinned, files, tmp_path, lambda _: None)
    (folder / "b").unlink()
    bucket.reads = 0
    assert one.place(pinned, files, tmp_path, lambda _: None) == folder
    assert bucket.reads == 1
    (folder / "b").unlink()
    del bucket.files["b"]
    with pytest.raises(RepoNotFound, match="b was removed"):
        one.place(pinned, files, tmp_path, lambda _: None)


def test_a_checksum_that_a_listing_gives_is_checked(tmp_path):
    """A file with another MD5 than was listed is read once more, and is BUNDLE_CORRUPT where that stays."""

    class Listed(FakeBucket):
        def list(self, prefix: str) -> Iterator[tuple[str, SourceFile]]:
            md5 = md5_of(base64.b64encode(hashlib.md5(b"right", usedforsecurity=False).digest()).decode())
            yield f"{prefix}a", SourceFile(5, None, md5, "1")

    bucket = Listed({"a": b"wrong"})
    with pytest.raises(
        BundleCorrupt, match=r"a: the content differs from the listing: expected md5:.*, found "
    ):
        source(bucket).fetch(source(bucket).resolve(REPO), ["a"], tmp_path)
    assert (bucket.reads, list(tmp_path.iterdir())) == (2, [])
    bucket.files["a"] = b"right"
    assert source(bucket).fetch(source(bucket).resolve(REPO), ["a"], tmp_path)["a"].size == 5
