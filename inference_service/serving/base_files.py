"""The small files of the base, for those who make text into tokens elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, Protocol

from loramux_shared.faults import BundleCorrupt, CheckpointInvalid
from loramux_shared.sources.checkpoint import CONFIG, INDEX, PlacedBase

GONE: Final = (
    "the tokenizer's files are no longer what they were when this replica was started. Restore them where it "
    "found them, or start it again."
)


class BaseFiles(Protocol):
    """Files of a base checkpoint, weights apart."""

    def read(self) -> Mapping[str, bytes]:
        """Return the contents by name, as the deployment recorded them; takes as long as reading them.

        Raises:
            CheckpointInvalid: they are not there any more, or are others.
        """
        ...

    def config(self) -> Mapping[str, Any]:
        """Return the fields of ``config.json``; they are read once.

        Raises:
            CheckpointInvalid: it is not there any more, or another.
        """
        ...


class PlacedFiles:
    """Those that a replica was loaded from; verified again whenever they are read."""

    def __init__(self, placed: PlacedBase) -> None:
        self._placed = placed
        self._config: Mapping[str, Any] | None = None

    def read(self) -> Mapping[str, bytes]:
        """Return the contents by name; without the index of the weights.

        Raises:
            CheckpointInvalid: they are not there any more, or are others.
        """
        try:
            with self._placed.small_files() as folder:
                return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != INDEX}
        except (BundleCorrupt, OSError) as error:
            raise CheckpointInvalid(GONE) from error  # whose own words may name folders

    def config(self) -> Mapping[str, Any]:
        """Return the fields of ``config.json``.

        Raises:
            CheckpointInvalid: it is not there any more, or another.
        """
        if self._config is None:
            self._config = json.loads(self.read()[CONFIG])
        return self._config


class NoBaseFiles:
    """Of a service that was made without a checkpoint."""

    def read(self) -> Mapping[str, bytes]:
        """Raise CheckpointInvalid."""
        raise CheckpointInvalid("this replica was made without a checkpoint, and has no tokenizer to give.")

    def config(self) -> Mapping[str, Any]:
        """Return nothing."""
        return {}
