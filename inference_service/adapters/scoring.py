"""Scores of texts: the head of an adapter that classifies, on the hidden state of the last token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from inference_service.adapters.served_model import ServedModel
from inference_service.core.sequence import Vector
from loramux_shared.bundle.kinds import SILENT
from loramux_shared.bundle.manifest import ScoreHead
from loramux_shared.bundle.npy import Array
from loramux_shared.faults import Finding, RequestInvalid


@dataclass(frozen=True)
class Scorer:
    """A score head; what it computes is float32."""

    head: ScoreHead
    weights: Array
    """(labels, hidden size), float32."""

    def scores(self, state: Vector) -> Vector:
        """Return the scores [labels] of a hidden state: transformers calls them logits."""
        found: Vector = self.weights @ state
        return found

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


def require_text(model: ServedModel) -> None:
    """Refuse to generate with an adapter that was trained for scores or vectors, and never for the base's head.

    Raises:
        RequestInvalid: it was.
    """
    silent = next((each for each in model.parts or (model,) if not SILENT.isdisjoint(each.kinds)), None)
    if silent is None:
        return
    found, fix = "one that makes vectors of texts", "Ask /v1/embeddings for them."
    if silent.num_labels is not None:
        found = "one that classifies texts"
        fix = "Ask /classify, /score or /rerank for its scores, or /v1/embeddings for vectors."
    raise refused_model(silent.name, "a model that generates text", found, fix)


def refused_model(name: str, expected: str, found: str, fix: str = "") -> RequestInvalid:
    """Return the fault of a model that does something else than it is asked for."""
    finding = Finding(code="E_BAD_FIELD", where="model", expected=expected, found=f"{name}, {found}", fix=fix)
    return RequestInvalid("the model does something else.", [finding])
