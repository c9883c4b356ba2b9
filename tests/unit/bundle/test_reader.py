from __future__ import annotations

from datetime import UTC, datetime

import pytest

from loramux_shared.bundle.claims import generation_numbers
from loramux_shared.bundle.deployments import current_generation, list_deployments, publish_generation
from loramux_shared.bundle.generation import current_key, generation_key
from loramux_shared.bundle.manifest import Manifest, bundle_key, sha256_hex
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.faults import BundleCorrupt, RecordTooLarge
from loramux_shared.storage.base import bound_of
from loramux_shared.storage.memory import MemoryStore
from tests.support.adapters import write_adapter, write_base
from tests.support.folders import built, deployment_of, workshop

FILES = ("model.lora_weights.npy", "model.lora_config.npy", "manifest.json")


@pytest.fixture
def store(tmp_path):
    """A store with one deployment of one adapter."""
    store = MemoryStore()
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "one")
    built(deployment_of(tmp_path, "one"), workshop(tmp_path, store))
    return store


def digest_of(store):
    """The digest of the one bundle."""
    return current_generation(store, "tiny").adapters["one"].digest


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(store, name):
    """Any changed byte of any file is BUNDLE_CORRUPT, with the digests that were expected and found."""
    key = bundle_key(digest_of(store), name)
    data = bytearray(store.objects[key])
    data[-2] ^= 1
    store.objects[key] = bytes(data)
    with pytest.raises(BundleCorrupt, match=r"expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}"):
        read_bundle(store, digest_of(store))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_short_file_is_found(store, name):
    """A missing file and a short one are BUNDLE_CORRUPT."""
    key = bundle_key(digest_of(store), name)
    data = store.objects.pop(key)
    with pytest.raises(BundleCorrupt, match="found none"):
        read_bundle(store, digest_of(store))
    store.objects[key] = data[:-1]
    with pytest.raises(BundleCorrupt, match="expected"):
        read_bundle(store, digest_of(store))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_larger_than_its_manifest_says_is_not_read(store, name):
    """RECORD_TOO_LARGE names the file and both sizes; manifests have a separate bound."""
    key = bundle_key(digest_of(store), name)
    size = bound_of(key) if name == "manifest.json" else len(store.objects[key])
    store.objects[key] = bytes(size + 1)
    with pytest.raises(RecordTooLarge, match=f"{name}: expected at most {size} bytes, found {size + 1}"):
        read_bundle(store, digest_of(store))


def resigned(store, name, change):
    """Change a file and its digest in the manifest, as a faulty converter would."""
    digest = digest_of(store)
    manifest = Manifest.from_bytes(store.objects[bundle_key(digest, "manifest.json")])
    data = change(bytearray(store.objects[bundle_key(digest, name)]))
    files = {
        **manifest.files,
        name: manifest.files[name].model_copy(update={"size": len(data), "sha256": sha256_hex(data)}),
    }
    signed = manifest.model_copy(update={"files": files}).to_bytes()
    for file in FILES[:2]:
        store.objects[bundle_key(sha256_hex(signed), file)] = store.objects[bundle_key(digest, file)]
    store.objects[bundle_key(sha256_hex(signed), name)] = bytes(data)
    store.objects[bundle_key(sha256_hex(signed), "manifest.json")] = signed
    return sha256_hex(signed)


def test_rows_are_checked_against_the_manifest(store):
    """A config row or padding that differs from the manifest is refused though every digest is right."""

    def other_rank(data):
        data[128 + 8] ^= 1
        return data

    def padded(data):
        data[-1] = 1
        return data

    with pytest.raises(BundleCorrupt, match=r"row 0: config: expected \[1, 0, 4, 0\]"):
        read_bundle(store, resigned(store, FILES[1], other_rank))
    with pytest.raises(BundleCorrupt, match="expected zeros after element"):
        read_bundle(store, resigned(store, FILES[0], padded))


def test_generations_are_numbered_and_pointed_to(store):
    """A new content gets the next number, the same content nothing new."""
    first = current_generation(store, "tiny")
    assert list_deployments(store) == ["tiny"]
    later = first.model_copy(update={"create_time": datetime.now(UTC)})
    assert publish_generation(store, later) == first
    second = publish_generation(store, first.model_copy(update={"max_seq_len": 64}))
    assert (second.number, current_generation(store, "tiny")) == (2, second)
    assert generation_numbers(store, "tiny") == [1, 2]


def test_a_generation_without_a_pointer_is_taken_up(store):
    """A generation that a killed builder left unserved is used by the same build, skipped by another."""
    first = current_generation(store, "tiny")
    pointer = store.objects[current_key("tiny")]
    left = publish_generation(store, first.model_copy(update={"max_seq_len": 64}))
    store.objects[current_key("tiny")] = pointer
    assert publish_generation(store, first.model_copy(update={"max_seq_len": 64})) == left
    store.objects[current_key("tiny")] = pointer
    assert publish_generation(store, first.model_copy(update={"max_seq_len": 128})).number == 3


def test_a_damaged_generation_is_named_and_replaced(store):
    """A damaged generation is BUNDLE_CORRUPT for readers; building again repairs the deployment."""
    first = current_generation(store, "tiny")
    store.objects[generation_key("tiny", 1)] += b" "
    with pytest.raises(BundleCorrupt, match="generation 1: expected sha256"):
        current_generation(store, "tiny")
    assert publish_generation(store, first).number == 2
    assert current_generation(store, "tiny").number == 2


@pytest.mark.parametrize("name", ["", "..", "a/b", "x" * 129, "a\n"])
def test_names_that_are_no_names_have_no_generation(store, name):
    """A name that cannot be a deployment's never becomes a key."""
    assert current_generation(store, name) is None
