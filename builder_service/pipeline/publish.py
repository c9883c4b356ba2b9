"""Publish: bundles first, each with its manifest last; then the generation; then the pointer to it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import structlog

from builder_service.pipeline.convert import BuiltBundle
from builder_service.pipeline.progress import Progress, Stage
from loramux_shared.bundle.manifest import MANIFEST_FILE, bundle_key
from loramux_shared.bundle.reader import read_manifest
from loramux_shared.faults import BundleCorrupt
from loramux_shared.storage.base import ObjectMissing, Store

log = structlog.get_logger()


def publish_bundle(
    store: Store, bundle: BuiltBundle, names: Sequence[str], served: Collection[str], progress: Progress
) -> None:
    """Put a bundle into the store, unless it is there; its files leave the work folder.

    What is there is read back: a file that differs from what was built is put again, and the adapters are
    reported as repaired where a replica could have met the damage.

    One that is there, and that the served generation does not refer to, may be an orphan: its manifest is
    put again, for its age is what keeps `loramux gc` from it until a generation does.
    """
    total = sum(file.size for file in bundle.manifest.files.values())
    for name in names:
        progress.enter(name, Stage.PUBLISHING, total)
    manifest = _stored_manifest(store, bundle)
    reused = manifest == bundle.manifest_bytes
    for file, path in bundle.paths.items():
        expected, key = bundle.manifest.files[file], bundle_key(bundle.digest, file)
        if store.sha256(key) == expected.sha256:
            path.unlink()
        else:
            store.take(key, path)
            reused = False
        for name in names:
            progress.advance(name, expected.size)
    if not reused or bundle.digest not in served:
        store.put(bundle_key(bundle.digest, MANIFEST_FILE), bundle.manifest_bytes)
    repaired = not reused and (manifest is not None or bundle.digest in served)
    if repaired:
        log.warning("damaged bundle repaired", digest=bundle.digest, adapters=list(names))
    for name in names:
        progress.update(name, stage=Stage.DONE, bytes_done=total, reused=reused, repaired=repaired)


def _stored_manifest(store: Store, bundle: BuiltBundle) -> bytes | None:
    try:
        return store.get(bundle_key(bundle.digest, MANIFEST_FILE))
    except ObjectMissing:
        return None


def hold(store: Store, digests: Collection[str]) -> None:
    """Make bundles young again, which a generation is about to refer to and the served one does not.

    Raises:
        BundleCorrupt: one of them is not there any more.
    """
    for digest in sorted(digests):
        manifest = read_manifest(store, digest)
        store.put(bundle_key(digest, MANIFEST_FILE), manifest.to_bytes())
        there = set(store.list(bundle_key(digest, "")))
        if lost := sorted(name for name in manifest.files if bundle_key(digest, name) not in there):
            raise BundleCorrupt(f"bundle {digest[:12]}: {lost[0]} is not in {store.uri}. Build again.")
