"""Bundles as bytes: a manifest and files behind it, whose digests are put into it before it is read."""

import io
import json
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

from loramux_shared.bundle.added_tokens import AddedToken, OwnTokens
from loramux_shared.bundle.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    OWN_TOKENS_FILE,
    SCORE_FILE,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    Manifest,
    bundle_key,
    sha256_hex,
)
from loramux_shared.bundle.npy import parse_header
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.storage.memory import MemoryStore
from loramux_shared.untrusted_json import parse_strict_json
from tests.fuzz.mutate import json_text, mutated_json, mutations
from tests.support.adapters import tensors, write_adapter, write_base
from tests.support.folders import context_of, deployment_of, run_build

CUT: Final = b"\x00|\x00"
"""Stands between the parts."""
FILES: Final = (WEIGHTS_FILE, CONFIG_FILE, VOCABULARY_FILE, SCORE_FILE, OWN_TOKENS_FILE)
Parts = tuple[dict[str, Any], dict[str, bytes]]
"""A manifest with the file's name where its digest is to be, and the files."""


def _npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


@cache
def parts() -> tuple[Parts, ...]:
    """Return a bundle that was built, and others with what a manifest may have beside rows."""
    with TemporaryDirectory() as made:
        folder = Path(made)
        write_base(folder / "base")
        write_adapter(folder / "a", tensors(("q_proj",), rank=2, layers=1), r=2)
        context = context_of(folder)
        bundle = run_build(deployment_of(folder, "a"), context).bundle("a")
    manifest = json.loads(bundle.manifest.to_bytes())
    files = {name: context.store.get(bundle_key(bundle.digest, name)) for name in manifest["files"]}
    scored = manifest | {
        "score": {"num_labels": 2, "hidden_size": 3, "id2label": ["a", "b"]},
        "format_version": 2,
    }
    score = {SCORE_FILE: _npy(np.ones((1, 2, 3), np.float32))}
    replaced = {"module_id": 124, "module": "embedding", "tokens": [[1, 2], [5, 1]], "features": 4}
    with_rows = manifest | {"replaced": [replaced], "format_version": 2, "vocab": 40}
    own = OwnTokens(vocab=40, tokens=(AddedToken(id=39, content="<x>", **dict.fromkeys(_FLAGS, False)),))
    rows = {VOCABULARY_FILE: _npy(np.ones((1, 1, 12), np.float16).view("V2")), OWN_TOKENS_FILE: own.to_bytes()}
    return (manifest, files), (scored, files | score), (with_rows, files | rows)


_FLAGS: Final = ("special", "lstrip", "rstrip", "single_word", "normalized")


def joined(manifest: bytes, files: dict[str, bytes]) -> bytes:
    """Return a manifest and files as bytes; a file that is not there is empty."""
    return CUT.join((manifest, *(files.get(name, b"") for name in FILES)))


def _named(found: Parts) -> dict[str, Any]:
    manifest, files = found
    return manifest | {"files": {name: f"@{FILES.index(name)}" for name in files}}


def seeds() -> list[bytes]:
    """Return bundles of valid parts."""
    return [joined(json.dumps(_named(each)).encode(), each[1]) for each in parts()]


def drawn(rng: Random) -> bytes:
    """Return a bundle whose manifest says something else, or one of whose files has other bytes."""
    chosen = rng.choice(parts())
    files = dict(chosen[1])
    if rng.random() < 0.3:
        name = rng.choice(sorted(files))
        files[name] = mutations(files[name], rng)
    return joined(json_text(mutated_json(_named(chosen), rng), rng), files)


def judge(data: bytes) -> None:
    """Read a bundle; raise BundleCorrupt for one that is refused.

    A manifest that is taken is written as JSON of one meaning, and read as the same; numpy reads the same
    numbers in a file that is taken.
    """
    manifest, *files = data.split(CUT, len(FILES))
    store = MemoryStore()
    for number, file in enumerate(files):
        record = json.dumps({"size": len(file), "sha256": sha256_hex(file)}).encode()
        manifest = manifest.replace(f'"@{number}"'.encode(), record)
    digest = sha256_hex(manifest)
    store.objects = {bundle_key(digest, name): file for name, file in zip(FILES, files, strict=False)}
    store.objects[bundle_key(digest, MANIFEST_FILE)] = manifest
    bundle = read_bundle(store, digest)
    again = bundle.manifest.to_bytes()
    parse_strict_json(again)
    assert Manifest.from_bytes(again) == bundle.manifest
    assert len(bundle.rows) == len(bundle.manifest.rows)
    assert bundle.manifest.summary.npy_files == bundle.manifest.npy_files
    for name in bundle.manifest.npy_files:
        _check_numbers(store.objects[bundle_key(digest, name)], name)
    if (own := bundle.texts.get(OWN_TOKENS_FILE)) is not None:
        tokens = OwnTokens.from_bytes(own)
        assert OwnTokens.from_bytes(tokens.to_bytes()) == tokens


def _check_numbers(file: bytes, name: str) -> None:
    theirs = np.load(io.BytesIO(file), allow_pickle=False)
    header = parse_header(file[:4096], name)
    assert theirs.shape == header.shape
    assert theirs.tobytes() == file[header.offset :]
