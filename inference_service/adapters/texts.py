"""Texts and score heads that adapters bring beside their weights, read before a request is tokenized."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

import numpy as np

from inference_service.adapters.recent import Recent
from inference_service.adapters.workers import Workers
from inference_service.core.sequence import Vector
from inference_service.core.served_model import AdapterDefaults, read_adapter_defaults
from inference_service.text.text import Text
from loramux_shared.bundle.manifest import ScoreHead
from loramux_shared.bundle.npy import Array
from loramux_shared.rpc.stopping import shielded


@dataclass(frozen=True)
class Scorer:
    """A score head; what it computes is float32."""

    head: ScoreHead
    weights: Array
    """Weights in the shape of the head, float32."""

    def scores(self, state: Vector) -> Vector:
        """Return the scores [labels] of a hidden state: transformers calls them logits."""
        if not self.head.dense:
            found: Vector = self.weights @ state
            return found
        dense, labels = np.split(self.weights, [self.head.hidden_size])
        scores: Vector = _affine(labels, np.tanh(_affine(dense, state)))
        return scores

    def activated(self, scores: Vector) -> Vector:
        """Return probabilities: softmax over labels, or sigmoid of each where one does not exclude another.

        Those of a regression are what they are.
        """
        if self.head.problem_type == "regression":
            return scores
        wide = scores.astype(np.float64)
        if self.head.num_labels == 1 or self.head.problem_type == "multi_label_classification":
            each: Vector = (0.5 + 0.5 * np.tanh(0.5 * wide)).astype(np.float32)
            return each
        powers = np.exp(wide - wide.max())
        shares: Vector = (powers / powers.sum()).astype(np.float32)
        return shares


def _affine(layer: Array, x: Vector) -> Vector:
    """Return what a layer [out, in + 1], whose last column are its biases, makes of x [in]."""
    found: Vector = layer[:, :-1] @ x + layer[:, -1]
    return found


CACHED: Final = 512
"""Adapters whose parsed texts are kept; a chat template with its macros takes some tens of KB."""
AT_ONCE: Final = 4
SCORERS_BYTES: Final = 64 << 20
"""Bytes of score heads that are kept; one of ten labels takes 160 KB at a hidden size of 4,096."""


class TextsReader(Protocol):
    """Reads what bundles bring beside weights; called on threads of readers."""

    def texts(self, digest: str) -> Mapping[str, bytes]:
        """Return a bundle's text files."""

    def score(self, digest: str) -> tuple[ScoreHead, Array]:
        """Return a bundle's score head, and its weights."""


class AdapterTexts:
    """Texts of bundles and what they mean, by digest; nobody waits for weights. Used on the event loop."""

    def __init__(self, reader: TextsReader, base: Text, of_base: Scorer | None = None) -> None:
        self._reader = reader
        self._base = base
        self._of_base = of_base
        self._workers = Workers("adapter-texts", AT_ONCE)
        self._kept: Recent[AdapterDefaults] = Recent(CACHED)
        self._scorers: Recent[Scorer] = Recent(SCORERS_BYTES)
        self._reading: dict[str, Future[AdapterDefaults]] = {}

    async def texts(self, digest: str) -> Mapping[str, bytes]:
        """Return the verified text files of a bundle by name, or raise what `BundleReader.texts` does."""
        return await asyncio.wrap_future(self._workers.submit(partial(self._reader.texts, digest)))

    async def defaults(self, digest: str, name: str) -> AdapterDefaults:
        """Return what an adapter's texts mean; several callers share one reading.

        Raises:
            AdapterInvalid: a file cannot be read, or the template cannot be parsed; name is who is named.
            BundleCorrupt: the store's files are missing or damaged.
            StoreUnavailable: the store does not answer.
        """
        if (cached := self._kept.get(digest)) is not None:
            return cached
        reading = self._reading.get(digest)
        if reading is None:
            reading = self._workers.submit(partial(self._read, digest, name))
            self._reading[digest] = reading
            reading.add_done_callback(lambda _: self._reading.pop(digest, None))
        return await shielded(asyncio.wrap_future(reading))

    async def scorer(self, digest: str) -> Scorer:
        """Return the score head of an adapter that classifies, or of the base, which has no digest.

        Raises:
            BundleCorrupt: the store's files are missing or damaged, or there is none.
            StoreUnavailable: the store does not answer.
        """
        if not digest and self._of_base is not None:
            return self._of_base
        if (cached := self._scorers.get(digest)) is not None:
            return cached
        return await asyncio.wrap_future(self._workers.submit(partial(self._read_scorer, digest)))

    def close(self) -> None:
        """End the threads."""
        self._workers.close()

    def _read_scorer(self, digest: str) -> Scorer:
        head, weights = self._reader.score(digest)
        scorer = Scorer(head, weights)
        self._scorers.put(digest, scorer, weights.nbytes)
        return scorer

    def _read(self, digest: str, name: str) -> AdapterDefaults:
        defaults = read_adapter_defaults(name, self._reader.texts(digest), self._base)
        self._kept.put(digest, defaults)
        return defaults
