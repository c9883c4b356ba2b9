"""A pushed adapter: files that a client sends, in a folder of the builder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Final

from builder_service.domain.rules.files import extra_files, file_findings
from builder_service.domain.rules.texts import too_large
from builder_service.pipeline.context import Space
from builder_service.pipeline.fetch import MAX_ADAPTER_BYTES, FetchedAdapter, no_signature, take_signature
from loramux_shared.adapter_files import (
    CONFIG,
    INDEX,
    KEYS_FILE,
    MODEL_CONFIG,
    TOKEN_FILES,
    WEIGHTS,
    holds_weights,
    wanted_files,
)
from loramux_shared.bundle.manifest import CONFIG_FILE, TEXT_FILES, WEIGHTS_FILE, FileDigest
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import AdapterInvalid, Finding, RequestInvalid
from loramux_shared.signatures import SIGNATURE
from loramux_shared.sources.files import content_digest, disk_errors
from loramux_shared.sources.licence import README, licence_in, reads_readme
from loramux_shared.wording import listed

NAMES: Final = (
    *(CONFIG, WEIGHTS, INDEX, WEIGHTS_FILE, CONFIG_FILE, KEYS_FILE),
    *sorted({*TEXT_FILES, *TOKEN_FILES, MODEL_CONFIG, README, SIGNATURE}),
)
"""The files that can be pushed, beside weights in several."""
MAX_SMALL: Final = 64 << 20
"""Bytes of a file that is not the weights."""
MAX_FILES: Final = 1024
"""Most files of an adapter."""


@dataclass
class PushedAdapter:
    """An adapter that comes in piece by piece, and is hashed on the way."""

    deployment: str
    name: str
    folder: Path
    space: Space
    others: Sequence[str] = ()
    """Names of files of its folder that are not sent."""
    _sizes: dict[str, int] = field(default_factory=dict)
    _hashes: dict[str, hashlib._Hash] = field(default_factory=dict)

    def write(self, file: str, data: bytes) -> None:
        """Append to a file.

        Raises:
            RequestInvalid: it is none that an adapter consists of, or too large, or there are too many.
            ResourcesExhausted: the disk is full, or a build may not write as much.
        """
        if file not in NAMES and not holds_weights(file):
            expected = f"{listed(NAMES, len(NAMES))}, or NAME.gguf"
            raise RequestInvalid(f"file {file[:128]!r}: expected one of {expected}")
        size = self._sizes.get(file, 0) + len(data)
        most = MAX_ADAPTER_BYTES if holds_weights(file) else MAX_SMALL
        if size > most or sum(self._sizes.values()) + len(data) > MAX_ADAPTER_BYTES + MAX_SMALL:
            raise RequestInvalid(
                f"file {file}: more than {most} bytes. An adapter has at most {MAX_ADAPTER_BYTES}."
            )
        if file not in self._sizes and len(self._sizes) >= MAX_FILES:
            raise RequestInvalid(f"file {file}: expected at most {MAX_FILES} files, found more.")
        self.space.room(f"adapter {self.name!r}")(len(data))
        self._sizes[file] = size
        self._hashes.setdefault(file, hashlib.sha256()).update(data)
        with disk_errors():
            self.folder.mkdir(exist_ok=True)  # in a work folder, which is there until the push ended
            with (self.folder / file).open("ab") as sink:
                sink.write(data)

    def fetched(self, signed_by: tuple[str, ...] = ()) -> FetchedAdapter:
        """Return the adapter as if it had been fetched.

        Raises:
            AdapterInvalid: files are missing or too large, or not signed by one of those who must have.
        """
        unsigned = no_signature(self._sizes) if signed_by else []
        known = {*self._sizes, *self.others}
        self._refuse("these are not the files of an adapter", file_findings(known), too_large(self._sizes))
        missing = [name for name in wanted_files(self._sizes) if name not in self._sizes]
        if missing:
            raise RequestInvalid(f"file {missing[0]}: expected its bytes, found only its name.")
        used = {*wanted_files(self._sizes), README, SIGNATURE}
        files = {
            name: FileDigest(size=size, sha256=self._hashes[name].hexdigest())
            for name, size in self._sizes.items()
            if name in used
        }
        self._refuse("it is not signed", unsigned or take_signature(self.folder, files, signed_by))
        files.pop(README, None)
        licence = licence_in(self.folder, ()) if reads_readme(self._sizes) else ""
        revision = content_digest(files)
        source = Repository(source=SourceKind.PUSHED, repo=self.name, revision=revision)
        extra = tuple(extra_files(known))
        return FetchedAdapter(self.name, self.folder, source, files, warnings=extra, licence=licence)

    def _refuse(self, why: str, *found: Iterable[Finding]) -> None:
        if findings := list(chain(*found)):
            named = [finding.model_copy(update={"adapter": self.name}) for finding in findings]
            raise AdapterInvalid(f"{self.name}: {why}", named)
