"""Records of generations and manifests, and bundles that are read by them."""

import hashlib
from typing import Any

import pytest

from loramux_shared.bundle.claims import REVOKED
from loramux_shared.bundle.deployments import current_generation, publish_change, publish_generation
from loramux_shared.bundle.generation import Generation, claim_key, current_key, generation_key
from loramux_shared.bundle.manifest import Manifest, ModuleRow, bundle_key, sha256_hex
from loramux_shared.bundle.names import OWN_NAME, ModelNames
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.deployment import Dtype
from loramux_shared.faults import BundleCorrupt, RecordTooLarge
from loramux_shared.storage.base import bound_of
from loramux_shared.storage.memory import MemoryStore
from tests.support.adapters import write_adapter, write_base
from tests.support.folders import context_of, deployment_of, run_build

OLD = (
    '{"adapters":{"one":{"digest":"' + "a" * 64 + '","source":{"repo":"org/one","revision":"r",'
    '"runtime_secret_name":"","source":"HF","subfolder":""}}},"base":{"files":{},"source":{"repo":"org/base",'
    '"revision":"","runtime_secret_name":"","source":"HF","subfolder":""}},"create_time":"2026-01-01T00:00:00Z",'
    '"deployment":"tiny","format_version":1,"lora_dtype":"bfloat16","lora_target_modules":[],"max_lora_rank":8,'
    '"max_seq_len":null,"merge":"auto","number":1,"request_default_max_tokens":null,"serve_base":true,'
    '"served_model_name":"tiny"}\n'
).encode()


def test_a_generation_of_an_older_release_keeps_its_bytes() -> None:
    """An absent field is not in its canonical bytes: pointers hold their digests."""
    found = Generation.from_bytes(OLD, sha256=hashlib.sha256(OLD).hexdigest())
    assert found.to_bytes() == OLD
    assert (found.recipe, found.adapters["one"].summary, found.adapters["one"].converter) == (None, None, None)


def test_what_a_revoked_builder_may_yet_write_is_not_newest() -> None:
    """Content that is served already gets a number above a revoked claim, whose owner may still write."""
    store = MemoryStore()
    served = Generation.from_bytes(OLD, sha256=hashlib.sha256(OLD).hexdigest())
    assert publish_generation(store, served).number == 1
    assert publish_change(store, "tiny", lambda current: current)[0].number == 1
    store.put(claim_key("tiny", 2, "0" * 16), REVOKED)
    published, _ = publish_change(store, "tiny", lambda current: current)
    assert published.number == 3
    assert current_generation(store, "tiny") == published


IN, OUT = 6, 10


def row(layer: int, rank: int, vectors: int = 0) -> ModuleRow:
    norms = {"norm_a": 1.0, "norm_b": 1.0, "norm_ba": 1.0}
    sizes = {"rank": rank, "in_features": IN, "out_features": OUT, "vectors": vectors}
    return ModuleRow(layer=layer, module_id=1, module="attn_q", scale=1.0, **norms, **sizes)


@pytest.mark.parametrize(
    ("rows", "tensors", "bytes_"),
    [
        ((row(0, 4),), 2, 2 * 4 * (IN + OUT)),
        ((row(0, 4), row(1, 2, vectors=2)), 6, 2 * (4 + 2) * (IN + OUT) + 2 * OUT * 4),
        ((row(0, 0, vectors=3),), 5, 2 * OUT * 4),
    ],
    ids=["pairs", "with vectors", "vectors alone"],
)
def test_tensors_and_bytes_of_rows(rows: tuple[ModuleRow, ...], tensors: int, bytes_: int) -> None:
    """A manifest counts the tensors and the bytes of its pairs and its vectors."""
    manifest = Manifest(dtype=Dtype.BFLOAT16, rows=rows, row_width=64, files={}, inputs={})
    assert (manifest.tensors_used, manifest.weights_bytes) == (tensors, bytes_)


def judged(*adapters: str, in_file: bool = False, **fields: Any) -> list[tuple[str, str]]:
    """Return where names do not fit a deployment with base "base" and alias "al", and the names found."""
    aliases = {"al": {"one": 1, "two": 0}}
    names = ModelNames(**{"base": "base", "adapters": adapters, "aliases": aliases} | fields)
    return [(finding.where, finding.found) for finding in names.findings(in_file=in_file)]


@pytest.mark.parametrize("name", ["al", "AL", "Base", "ONE"])
def test_each_model_has_a_name_of_its_own(name: str) -> None:
    """Names differ in more than case, aliases included."""
    owner = {"al": "alias al", "base": "the base base", "one": "adapter one"}[name.lower()]
    assert judged("one", name) == [(f"adapters.{name}", owner)]
    [finding] = ModelNames("base", ("one", name), {"al": {"one": 1}}).findings()
    assert finding.expected == OWN_NAME
    assert ModelNames("base", ("one",), {"al": {"one": 1}}).owner(name) == owner


def test_an_alias_has_a_model_that_answers() -> None:
    """An alias whose share goes to models that do not exist is found, in a file and in a generation."""
    assert judged("one") == []
    assert judged("two") == [("runtime.aliases.al", "one: 1, two: 0")]
    assert judged("one", in_file=True) == [("runtime.aliases.al", "two")]
    to_base = {"aliases": {"al": {"base": 1}}}
    assert judged(**to_base) == []
    assert judged("one", serve_base=False, **to_base) == [("runtime.aliases.al", "base: 1")]


def test_something_is_served() -> None:
    """A generation that serves neither an adapter nor the base is found."""
    assert judged(serve_base=False, aliases={}) == [("adapters", "none")]
    found = "adapters: one, two; runtime.serve_base: false"
    assert judged("one", "two", serve_base=False, merge_always=True) == [("adapters", found)]


FILES = ("model.lora_weights.npy", "model.lora_config.npy", "manifest.json")


@pytest.fixture
def store(tmp_path):
    store = MemoryStore()
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "one")
    run_build(deployment_of(tmp_path, "one"), context_of(tmp_path, store))
    return store


def digest_of(store):
    return current_generation(store, "tiny").adapters["one"].digest


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_short_file_is_found(store, name):
    """A bundle with a file that is absent or cut is corrupt."""
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
    size = {"size": len(data), "sha256": sha256_hex(data)}
    files = {**manifest.files, name: manifest.files[name].model_copy(update=size)}
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
    """A deployment whose name is not valid has no generation, and its name is no key of the store."""
    assert current_generation(store, name) is None
