"""Texts and score heads that adapters bring beside their weights, read before a request is tokenized."""

import asyncio
from collections.abc import Callable, Mapping
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

    def scores(self, states: Vector) -> Vector:
        """Return the scores [labels] of a hidden state, or of all [tokens, labels]: transformers' logits."""
        head = self.head
        if not head.dense and not head.of_tokens:
            found: Vector = self.weights @ states
            return found
        x = states.reshape(-1, head.hidden_size) if head.of_tokens else states
        dense, norm, labels = np.split(self.weights, head.parts)
        if head.dense:
            x = _affine(dense, x)
            x = (
                BEHIND_DENSE[head.activation](x)
                if head.norm_eps is None
                else _normed(norm, gelu(x), head.norm_eps)
            )
        return _affine(labels, x)

    def activated(self, scores: Vector) -> Vector:
        """Return probabilities: softmax over labels, or sigmoid of each where one does not exclude another.

        Those of a regression are what they are; of tokens, transformers' pipeline has no other than softmax.
        """
        head, wide = self.head, scores.astype(np.float64)
        if not head.of_tokens and head.problem_type == "regression":
            return scores
        if not head.of_tokens and (head.num_labels == 1 or head.problem_type == "multi_label_classification"):
            each: Vector = (0.5 + 0.5 * np.tanh(0.5 * wide)).astype(np.float32)
            return each
        powers = np.exp(wide - wide.max(-1, keepdims=True))
        shares: Vector = (powers / powers.sum(-1, keepdims=True)).astype(np.float32)
        return shares


def _affine(layer: Array, x: Vector) -> Vector:
    """Return what a layer [out, in + 1], whose last column are its biases, makes of x [in] or [tokens, in]."""
    found: Vector = x @ layer[:, :-1].T + layer[:, -1]
    return found


def _normed(norm: Array, x: Vector, eps: float) -> Vector:
    """Return the layer norm of x, with the weight and the bias that norm has as rows."""
    wide = x - x.mean(-1, keepdims=True, dtype=np.float64)
    scale = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + eps)
    found: Vector = (wide * scale * norm[0, :-1] + norm[1, :-1]).astype(np.float32)
    return found


ERF: Final = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592, 0.0)
"""Coefficients of Abramowitz and Stegun's 7.1.26, which is off by at most 1.5e-7."""


def gelu(x: Vector) -> Vector:
    """Return gelu of every number; API processes have numpy alone."""
    wide = np.abs(x, dtype=np.float64) * 0.5**0.5
    tail = np.polyval(ERF, 1 / (1 + 0.3275911 * wide)) * np.exp(-(wide**2))
    found: Vector = (x * (0.5 + np.copysign(0.5 - 0.5 * tail, x))).astype(np.float32)
    return found


BEHIND_DENSE: Final[Mapping[str | None, Callable[[Vector], Vector]]] = {
    None: np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": gelu,
}


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
