"""A backend that also remembers what an adapter added at some rows of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from inference_service.backends.base import StepLora
from inference_service.kernels.experts.layout import ByExpert
from inference_service.lora.segments import Arrangement, Segment
from inference_service.lora.vocabulary import StepVocabulary, Vocabularies
from inference_service.models.decoder import Decoder
from inference_service.proof.fingerprint import EMBEDDING, HEAD
from loramux_shared.bundle.manifest import Manifest
from loramux_shared.bundle.modules import NO_LAYER
from loramux_shared.deployment import Dtype
from loramux_shared.runtime import Rounding

EPSILON: Final = {
    Dtype.FLOAT32: torch.finfo(torch.float32).eps,
    Dtype.FLOAT16: torch.finfo(torch.float16).eps,
    Dtype.BFLOAT16: torch.finfo(torch.bfloat16).eps,
}
OF_ROUNDED_HEAD: Final = 0.02
"""Tolerance of the base's logits where its head is rounded to 8 bits."""


class ProbeRecorder:
    """Remembers what each module's output became at the probes' last rows.

    Of modules with vectors, and of embeddings and head, that is how outputs differ, and what these are rounded
    by must be allowed for.
    """

    def __init__(self, inner: StepLora, rows: Sequence[int], model: Decoder, manifest: Manifest) -> None:
        self._inner = inner
        self._affine = {(row.layer, row.module) for row in manifest.rows if row.vectors}
        self._replaced = {part.module for part in manifest.replaced}
        self._stored = EPSILON[manifest.dtype] / 2
        self._of_head = OF_ROUNDED_HEAD if model.rounding.of_head is not Rounding.NONE else 0.0
        self._rows = list(rows)
        self._groups = {group.name: group for group in model.config.groups}
        self.vocabularies: Vocabularies = _Vocabularies(inner.vocabularies, self)
        self.added: dict[tuple[int, str], Tensor] = {}
        self.rounded: dict[tuple[int, str], float] = {}
        """Norms of the rounding errors; absent where there are no vectors."""

    def begin(self, arrangement: Arrangement) -> None:
        """Prepare for the rows of a step."""
        self._inner.begin(arrangement)

    def apply(self, x: Tensor, out: Tensor, layer: int, group: str) -> None:
        """Add what the adapter makes of x, and keep it."""
        alone = torch.zeros_like(out)
        self._inner.apply(x, alone, layer, group)
        before = out[self._rows]
        self._inner.apply(x, out, layer, group)
        shape = self._groups[group]
        rows = (alone[self._rows], before, out[self._rows])
        parts = [torch.split(each, list(shape.out_features), dim=-1) for each in rows]
        for module, added, was, became in zip(shape.modules, *parts, strict=True):
            self.added[layer, module] = added
            if (layer, module) in self._affine:
                self.added[layer, module] = became.float() - was.float()
                self.rounded[layer, module] = torch.finfo(out.dtype).eps / 2 * float(became.float().norm())

    def adapts_experts(self, layer: int) -> bool:
        """Return whether an adapter of the step may add to experts of a layer."""
        return self._inner.adapts_experts(layer)

    def apply_experts(self, x: Tensor, out: Tensor, layer: int, group: str, pairs: ByExpert) -> None:
        """Add what the adapter makes of x: which experts a row has is not known to a proof."""
        self._inner.apply_experts(x, out, layer, group, pairs)

    def embedded(self, before: Tensor, after: Tensor) -> None:
        """Keep what became of the embeddings [T, hidden] of a step."""
        self._differs(EMBEDDING, before[self._rows], after[self._rows])

    def drawn(self, before: Tensor, after: Tensor) -> None:
        """Keep what became of the logits [probes, vocab]."""
        self._differs(HEAD, before, after)
        self.rounded[NO_LAYER, HEAD] += self._of_head * float(before.float().norm())

    def _differs(self, module: str, before: Tensor, after: Tensor) -> None:
        was, became = before.float(), after.float()
        stored = self._stored if module in self._replaced else 0.0
        half = torch.finfo(after.dtype).eps / 2
        self.added[NO_LAYER, module] = became - was
        self.rounded[NO_LAYER, module] = (half + stored) * float(became.norm()) + half * float(was.norm())


class _Vocabularies(Vocabularies):
    """The vocabularies of a backend, with a record of their steps."""

    def __init__(self, inner: Vocabularies, recorder: ProbeRecorder) -> None:
        super().__init__()
        self._inner, self._recorder = inner, recorder

    def of(
        self, segments: Sequence[Segment], drawing: Callable[[], Sequence[Segment]]
    ) -> StepVocabulary | None:
        """Return what a step does, and keep what becomes of it."""
        own = self._inner.of(segments, drawing)
        return None if own is None else _StepVocabulary(own, self._recorder)


class _StepVocabulary(StepVocabulary):
    """The vocabulary of a step that records its work."""

    def __init__(self, inner: StepVocabulary, recorder: ProbeRecorder) -> None:
        super().__init__((), ())
        self._inner, self._recorder = inner, recorder

    def known(self, tokens: Tensor, vocab: int) -> Tensor:
        """Return tokens that the base has."""
        return self._inner.known(tokens, vocab)

    def embed(self, tokens: Tensor, hidden: Tensor, scale: float, *, by_row: bool) -> None:
        """Change embeddings in place."""
        before = hidden.clone()
        self._inner.embed(tokens, hidden, scale, by_row=by_row)
        self._recorder.embedded(before, hidden)

    def head(self, hidden: Tensor, logits: Tensor, *, by_row: bool) -> Tensor:
        """Return what becomes of logits."""
        before = logits.clone()
        after = self._inner.head(hidden, logits, by_row=by_row)
        self._recorder.drawn(before, after)
        return after
