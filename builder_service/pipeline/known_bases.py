"""Bases as they were recorded, read again without a look at their weights."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import Any, Final, TypeAlias

from builder_service.pipeline.base_weights import BaseWeights
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.formats.read import QUANTIZE, with_quantize
from loramux_shared.bases.read import read_fields
from loramux_shared.bundle.generation import BaseRecord
from loramux_shared.sources.checkpoint import CONFIG, GENERATION, Base

MOST: Final = 64
"""Configs that are remembered; one is a few KB."""

CONFIGS: Final = (CONFIG, GENERATION, QUANTIZE)
"""Files that describe a base."""

_Key: TypeAlias = tuple[tuple[str, ...], int | None]


class KnownBases:
    """Remembers the configs of bases by their digests; safe for several threads."""

    def __init__(self) -> None:
        self._models: OrderedDict[_Key, ModelConfig] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, base: Base, max_seq_len: int | None) -> None:
        """Keep what was read of a base."""
        with self._lock:
            self._models[_key(base.record, max_seq_len)] = base.model
            while len(self._models) > MOST:
                self._models.popitem(last=False)

    def recall(self, record: BaseRecord, max_seq_len: int | None, weights: BaseWeights) -> Base:
        """Return a recorded base; its configs are fetched where they were not read before.

        Raises:
            BundleCorrupt: a config is not the recorded one any more.
            CheckpointInvalid: this release does not serve the base.
            Fault: what its source raises.
        """
        with self._lock:
            known = self._models.get(_key(record, max_seq_len))
        if known is not None:
            return Base(record, known)
        fields, generation, quantize = (
            _fields(weights, name) if name in record.files else None for name in CONFIGS
        )
        model = read_fields(with_quantize(fields or {}, quantize), generation, max_seq_len)
        base = Base(record, model)
        self.remember(base, max_seq_len)
        return base


def _key(record: BaseRecord, max_seq_len: int | None) -> _Key:
    digests = [record.files[name].sha256 if name in record.files else "" for name in CONFIGS]
    return tuple(digests), max_seq_len


def _fields(weights: BaseWeights, name: str) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(weights.fetch(name).read_bytes())
    return fields
