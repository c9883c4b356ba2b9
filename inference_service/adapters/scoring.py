"""Scores of texts: the head of an adapter that classifies, on the hidden state of the last token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from inference_service.core.sequence import Vector
from loramux_shared.bundle.manifest import ScoreHead
from loramux_shared.bundle.npy import Array


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
