"""The small files of the base, for clients that make text into tokens themselves."""

from collections.abc import Mapping
from typing import Any, Final

from loramux_shared.faults import BundleCorrupt, CheckpointInvalid
from loramux_shared.sources.checkpoint import CONFIG, INDEX, PlacedBase
from loramux_shared.untrusted_json import parse_json

GONE: Final = (
    "the tokenizer's files changed since this replica was started. Restore them, or restart the replica."
)


class BaseFiles:
    """Files of the checkpoint that a replica was loaded from, weights apart; verified at every read."""

    def __init__(self, placed: PlacedBase | None = None) -> None:
        """Read those of a checkpoint; None is a service that was made without one."""
        self._placed = placed
        self._config: Mapping[str, Any] | None = {} if placed is None else None

    def read(self) -> Mapping[str, bytes]:
        """Return the contents by name, without the index of the weights; takes as long as reading them.

        Raises:
            CheckpointInvalid: they are not there any more, or are others; or there is no checkpoint.
        """
        if self._placed is None:
            raise CheckpointInvalid("this replica has no checkpoint, and so no tokenizer to return.")
        try:
            with self._placed.small_files() as folder:
                return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != INDEX}
        except (BundleCorrupt, OSError) as error:
            raise CheckpointInvalid(GONE) from error  # the error's text may name folders

    def config(self) -> Mapping[str, Any]:
        """Return the fields of ``config.json``, which are read once; nothing without a checkpoint.

        Raises:
            CheckpointInvalid: it is not there any more, or another.
        """
        if self._config is None:
            self._config = parse_json(self.read()[CONFIG])
        return self._config
