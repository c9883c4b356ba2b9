"""The disk tier: bundles are verified, bounded and complete, never required."""

import os
import time
from collections import UserDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from inference_service.adapters import reading
from inference_service.adapters.disk import DiskTier, open_disk_tier
from inference_service.adapters.reading import BundleReader, Tier
from loramux_shared.bundle.manifest import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, bundle_key
from loramux_shared.bundle.reader import files_of, parse_manifest
from loramux_shared.process import YOUNG_S
from tests.support.stores.bundles import flip_bit
from tests.unit.adapters.test_adapter_loader import built as built, store as store

DIGEST = "0" * 64
FILES = (MANIFEST_FILE, WEIGHTS_FILE, CONFIG_FILE, "chat_template.jinja")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "bundles"


def keep(store, disk, digest):
    """Read a bundle as a load does, and keep it."""
    reader = BundleReader(store, disk)
    with reader.reading(digest) as found:
        reader.keep(found)
    reader.close()
    return found.tier


def size_of(store, digest):
    return sum(len(data) for key, data in store.objects.items() if digest in key)


def test_a_kept_bundle_is_read_without_the_store(store, folder):
    """The second reading asks the store for nothing and gives the same rows and texts."""
    digest, disk = store.digests[0], DiskTier(folder, 10**9)
    assert keep(store, disk, digest) is Tier.STORE
    count = len(store.asked)
    reader = BundleReader(store, disk)
    with reader.reading(digest) as found:
        assert found.tier is Tier.DISK
        assert len(store.asked) == count
        with BundleReader(store, None).reading(digest) as other:
            assert found.bundle.texts == other.bundle.texts
            for own, its in zip(found.bundle.rows, other.bundle.rows, strict=True):
                assert own.a.tobytes() == its.a.tobytes()
                assert own.b.tobytes() == its.b.tobytes()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped", "short", "long", "gone", "folder", "pipe", "link"])
def test_a_damaged_file_is_found_and_the_bundle_fetched_again(
    store, folder, tmp_path, name, damage, monkeypatch
):
    """A kept bundle with any damage is served from the store, and replaced by that."""
    monkeypatch.setattr(reading, "AT_ONCE_BYTES", 1)  # a read that took it twice would wait for itself
    digest, disk = store.digests[0], DiskTier(folder, 10**9)
    keep(store, disk, digest)
    path = folder / digest / name
    data = path.read_bytes()
    path.unlink()
    if damage == "flipped":
        path.write_bytes(flip_bit(data))
    elif damage == "short":
        path.write_bytes(data[:-1])
    elif damage == "long":
        path.write_bytes(data + b"\0")
    elif damage == "folder":
        path.mkdir()
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage == "link":
        other = tmp_path / "elsewhere"
        other.write_bytes(data)
        path.symlink_to(other)
    with capture_logs() as logs:
        assert keep(store, disk, digest) is Tier.STORE
    assert any("cached bundle" in line["event"] for line in logs)
    assert keep(store, disk, digest) is Tier.DISK


def test_the_oldest_bundles_leave(store, folder):
    """The least recently used leave above the bound, more than must; a bundle that was just read stays."""
    first, second, third, _ = store.digests
    room = size_of(store, first) + size_of(store, second) + size_of(store, third) // 2
    disk = DiskTier(folder, room)
    for age, digest in ((300, first), (200, second)):
        keep(store, disk, digest)
        os.utime(folder / digest, (time.time() - age,) * 2)
    assert keep(store, disk, first) is Tier.DISK  # used again
    keep(store, disk, third)
    retained = {path.name for path in folder.iterdir()}
    assert third in retained
    assert second not in retained
    used = sum(size_of(store, digest) for digest in retained)
    assert used <= room
    tiny = folder / ("0" * 64)
    tiny.mkdir()
    (tiny / MANIFEST_FILE).write_bytes(b"x")
    os.utime(tiny, (0, 0))
    DiskTier(folder, used).sweep()
    assert [path.name for path in folder.iterdir()] == [third]


def test_a_bundle_larger_than_the_bound_is_not_kept(store, folder):
    """A bundle that exceeds the bound alone is not written to the disk."""
    disk = DiskTier(folder, size_of(store, store.digests[0]))
    keep(store, disk, store.digests[0])
    assert not folder.exists()


def test_leftovers_are_swept_and_work_under_way_is_not(store, folder):
    """The sweep removes the folder of a killed writer, and leaves locked and young folders."""
    disk = DiskTier(folder, 10**9)
    keep(store, disk, store.digests[0])
    old = time.time() - 2 * YOUNG_S
    left = folder / ".part-left"
    young = folder / ".part-young"
    for path in (left, young):
        path.mkdir()
        (path / WEIGHTS_FILE).write_bytes(b"half")
    os.utime(left, (old, old))
    swept: list[Path] = []

    class SweptMeanwhile(UserDict[str, bytes]):
        """Files of a bundle; another replica sweeps when the writer has its folder and asks for them."""

        def keys(self):
            [writing] = set(folder.glob(".part-*")) - {left, young}
            os.utime(writing, (old, old))
            DiskTier(folder, 10**9).sweep()
            swept.append(writing)
            assert writing.exists()
            assert young.exists()
            assert not left.exists()
            return super().keys()

    disk.put(DIGEST, b"{}", SweptMeanwhile({WEIGHTS_FILE: b"whole"}))
    assert len(swept) == 1
    assert (folder / DIGEST / WEIGHTS_FILE).read_bytes() == b"whole"
    assert keep(store, disk, store.digests[0]) is Tier.DISK


def test_a_folder_that_cannot_be_written_is_reported_once(store, tmp_path):
    """Loads continue from the store, and the log says once why nothing is kept."""
    place = tmp_path / "file"
    place.write_bytes(b"")
    disk = DiskTier(place / "bundles", 10**9)
    with capture_logs() as logs:
        for digest in store.digests:
            assert keep(store, disk, digest) is Tier.STORE
    events = [line for line in logs if "without the cache" in line["event"]]
    assert len(events) == 1
    assert "LORAMUX_ADAPTER_DISK_GB" in events[0]["fix"]


def test_replicas_share_a_folder(store, folder):
    """Replicas that read, keep and damage the same bundles at once read none wrongly, and leave no part."""

    def serve(disk):
        reader = BundleReader(store, disk)
        for number, digest in enumerate(store.digests * 8):
            with reader.reading(digest) as found:
                assert found.bundle.digest == digest
                reader.keep(found)
            if number % 4 == 3:
                with suppress(FileNotFoundError), (folder / digest / WEIGHTS_FILE).open("r+b") as file:
                    file.write(b"damage")
        reader.close()

    disks = [DiskTier(folder, 10**9) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(serve, disks))
    assert not list(folder.glob(".part-*"))
    for digest in store.digests:
        keep(store, disks[0], digest)
        assert keep(store, disks[1], digest) is Tier.DISK


def test_texts_come_without_the_weights(store, folder):
    """The text files of a kept bundle are read from disk, though its weights are damaged."""
    digest, disk = store.digests[0], DiskTier(folder, 10**9)
    reader = BundleReader(store, disk)
    from_store = reader.texts(digest)
    assert bundle_key(digest, WEIGHTS_FILE) not in store.asked
    keep(store, disk, digest)
    count = len(store.asked)
    assert reader.texts(digest) == from_store != {}
    assert len(store.asked) == count


@pytest.mark.parametrize("digest", ["", "..", "../" + "a" * 61, "A" * 64, "a" * 63])
def test_what_is_no_digest_is_no_path(folder, digest):
    """A digest that is not 64 hex digits never becomes a path."""
    with pytest.raises(ValueError, match="64 hex digits"):
        DiskTier(folder, 10**9).manifest(digest)


def test_a_bundle_without_weights_is_refused(store):
    """A manifest that names no weights is BUNDLE_CORRUPT before anything else is read."""
    data = store.objects[bundle_key(store.digests[1], MANIFEST_FILE)]
    manifest = parse_manifest(data, store.digests[1])
    less = {name: file for name, file in manifest.files.items() if name != WEIGHTS_FILE}
    with pytest.raises(Exception, match=f"expected a digest of {WEIGHTS_FILE}"):
        files_of(manifest.model_copy(update={"files": less}), store.digests[1])


def test_a_folder_beside_the_store_gets_no_copies(tmp_path):
    """Bundles of S3 and of other disks are kept; those of a store on the same disk, or with 0 GB, are not."""
    cache = tmp_path / "cache" / "loramux"
    assert open_disk_tier(cache, 1, "s3://bucket/prefix") is not None
    assert open_disk_tier(cache, 1, "file:///proc") is not None
    assert open_disk_tier(cache, 1, f"file://{tmp_path}/store") is None
    assert open_disk_tier(cache, 0, "s3://bucket/prefix") is None
