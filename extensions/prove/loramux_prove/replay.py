"""Replays the proof of an adapter through the engine's own path, before the adapter is served.

Two things are compared: the log probabilities of the most likely tokens behind each probe, and for every row of
the bundle what it adds to its module's output. The first would show whatever is wrong with base and adapter
together, but in bfloat16 the rounding of a whole model hides one wrong row of hundreds. The second is about one
row at a time: zeroed, doubled or exchanged, it is off by its own size, and rounding moves it by a few percent.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from inference_service.adapters.loader import ProofReplay
from inference_service.core.adapter import Adapter
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, Chunk, Sequence as EngineSequence, Token
from inference_service.engine.backends.base import StepLora
from inference_service.engine.execution.runner import Pending, Runner
from inference_service.engine.kernels.experts.layout import ByExpert
from inference_service.engine.lora.segments import Arrangement, Segment
from inference_service.engine.lora.vocabulary import StepVocabulary, Vocabularies
from inference_service.engine.models.decoder import Decoder
from loramux_prove.fingerprint import EMBEDDING, HEAD, difference, effect_of
from loramux_shared.bundle.manifest import Manifest
from loramux_shared.bundle.modules import NO_LAYER
from loramux_shared.bundle.proof import PROBE_LENGTHS, Effect, Probe, Proof
from loramux_shared.deployment import Dtype
from loramux_shared.faults import ProofFailed
from loramux_shared.runtime import Rounding

EPSILON: Final = {
    Dtype.FLOAT32: torch.finfo(torch.float32).eps,
    Dtype.FLOAT16: torch.finfo(torch.float16).eps,
    Dtype.BFLOAT16: torch.finfo(torch.bfloat16).eps,
}
OF_ROUNDED_HEAD: Final = 0.02
"""Tolerance of the base's logits where its head is rounded to 8 bits."""


class ProbeRecorder(StepLora):
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


@dataclass(frozen=True)
class Tolerance:
    """The largest difference between a replay and its proof."""

    logprob: float
    """Root of the mean square, over all tokens that the proof names."""
    effect: float
    """Relative to the row's norm."""

    def __add__(self, other: Tolerance) -> Tolerance:
        return Tolerance(self.logprob + other.logprob, self.effect + other.effect)


COMPUTING: Final[Mapping[Dtype, Tolerance]] = {
    Dtype.FLOAT32: Tolerance(logprob=0.005, effect=0.002),
    Dtype.FLOAT16: Tolerance(logprob=0.1, effect=0.1),
    Dtype.BFLOAT16: Tolerance(logprob=0.5, effect=0.4),
}
"""Tolerances by the replica's type. Measurements and reasons: docs/decisions/0010-proofs.md."""
STORING: Final[Mapping[Dtype, Tolerance]] = {
    Dtype.FLOAT32: Tolerance(logprob=0.0, effect=0.0),
    Dtype.FLOAT16: Tolerance(logprob=0.005, effect=0.01),
    Dtype.BFLOAT16: Tolerance(logprob=0.02, effect=0.05),
}
"""Further tolerances by the bundle's type."""
TABLES: Final[Mapping[Dtype, Tolerance]] = {
    Dtype.FLOAT32: Tolerance(logprob=0.0, effect=0.0),
    Dtype.FLOAT16: Tolerance(logprob=0.02, effect=0.0),
    Dtype.BFLOAT16: Tolerance(logprob=0.15, effect=0.0),
}
"""The same again where rows of embeddings or head are in it, which round as whole weights do."""
ROUNDING: Final[Mapping[Rounding, Tolerance]] = {
    Rounding.NONE: Tolerance(logprob=0.0, effect=0.0),
    Rounding.INT8: Tolerance(logprob=0.4, effect=0.3),
    Rounding.FP8: Tolerance(logprob=1.0, effect=0.5),
    Rounding.INT4: Tolerance(logprob=4.0, effect=3.0),
}
"""Tolerances by the rounding of the base's weights; at 4 bits only a gross error shows.

Not measured for fp8.
"""
_TORCH: Final = {
    torch.float32: Dtype.FLOAT32,
    torch.float16: Dtype.FLOAT16,
    torch.bfloat16: Dtype.BFLOAT16,
}
WIDE: Final = 2048
"""Most likely tokens of a replay among which the proof's are looked for."""


@dataclass(frozen=True)
class Replayed:
    """The differences of a replay from its proof, and the tolerance."""

    logprob: float
    effect: float
    allowed: Tolerance


def replay(
    name: str, proof: Proof, manifest: Manifest, adapter: Adapter, lora: StepLora, model: Decoder, block: int
) -> Replayed:
    """Replay an adapter's proof.

    Raises:
        ProofFailed: the adapter answers otherwise; the message names it, the worst difference and the limit.
    """
    allowed = COMPUTING[_TORCH[model.dtype]] + STORING[manifest.dtype] + ROUNDING[model.rounding]
    if manifest.replaced:
        allowed += TABLES[manifest.dtype]
    _expect_sound(name, proof, manifest, model.config.dims.vocab)
    ends = torch.tensor([len(probe.tokens) for probe in proof.probes]).cumsum(0) - 1
    recorder = ProbeRecorder(lora, ends.tolist(), model, manifest)
    batch, pending = _submit([probe.tokens for probe in proof.probes], adapter, recorder, model, block)
    answers = dict(pending.tokens())
    effect = 0.0
    # In the order of computation: a wrong row makes later rows wrong, so the first one is the cause.
    for place, expected in _in_order(manifest, proof.effects, model):
        off = difference(effect_of(recorder.added[place]), expected, recorder.rounded.get(place, 0.0))
        if off > allowed.effect:
            layer, module = place
            where = module if layer == NO_LAYER else f"layer {layer} {module}"
            raise ProofFailed(
                f"adapter {name!r}: {where} adds something else than its proof says: "
                f"relative difference {off:.3g}, at most {allowed.effect:g} is rounding. {_CURE}"
            )
        effect = max(effect, off)
    logprob = _logprob_difference([answers[chunk.seq] for chunk in batch.chunks], proof.probes)
    if logprob > allowed.logprob:
        raise ProofFailed(
            f"adapter {name!r}: log probabilities differ from its proof by {logprob:.3g}, "
            f"at most {allowed.logprob:g} is rounding. {_CURE}"
        )
    return Replayed(logprob, effect, allowed)


_CURE: Final = "Build the deployment again; if it stays, this replica computes wrongly: please report it."


def _in_order(
    manifest: Manifest, effects: Sequence[Effect], model: Decoder
) -> list[tuple[tuple[int, str], Effect]]:
    """Return the effects, each with its layer and module, as a step computes them: embeddings first."""
    layers = [[module for group in groups for module in group.modules] for groups in model.config.layer_groups]
    places = [(row.layer, row.module) for row in manifest.rows]
    places += [(NO_LAYER, part.module) for part in manifest.replaced]

    def turn(pair: tuple[tuple[int, str], Effect]) -> tuple[int, int]:
        (layer, module), _ = pair
        if layer == NO_LAYER:
            return (-1 if module == EMBEDDING else len(layers)), 0
        return layer, layers[layer].index(module)

    return sorted(zip(places, effects, strict=True), key=turn)


def _expect_sound(name: str, proof: Proof, manifest: Manifest, vocab: int) -> None:
    ids = [*(token for probe in proof.probes for token in probe.tokens)]
    ids += [item.id for probe in proof.probes for item in probe.top]
    if len(proof.effects) != len(manifest.parts) or max(ids) >= vocab:
        raise ProofFailed(f"adapter {name!r}: its proof is about another bundle or another base. {_CURE}")


def rehearse(lora: StepLora, model: Decoder, block: int) -> None:
    """Launch what the replay of a proof launches, for no adapter, so that the first proof compiles nothing."""
    _submit([[0] * length for length in PROBE_LENGTHS], None, lora, model, block)


def _submit(
    probes: Sequence[Sequence[int]], adapter: Adapter | None, lora: StepLora, model: Decoder, block: int
) -> tuple[Batch, Pending]:
    """Begin to compute all probes in one step of a runner of their own."""
    chunks, blocks = [], 0
    sampling = SamplingParams(max_tokens=1, logprobs=min(WIDE, model.config.dims.vocab))
    for index, tokens in enumerate(probes):
        seq = EngineSequence(f"probe {index}", list(tokens), sampling, adapter)
        need = math.ceil(len(tokens) / block)
        seq.progress.blocks, seq.progress.state_slot = array("i", range(blocks, blocks + need)), index
        blocks += need
        chunks.append(Chunk(seq, len(tokens)))
    batch = Batch(tuple(chunks))
    return batch, Runner(model, lora, blocks, block, len(probes)).submit(batch)


def _logprob_difference(answers: Sequence[Token], probes: Sequence[Probe]) -> float:
    """Infinite where a token of the proof is not even among the most likely ones."""
    errors = [
        dict(answer.top).get(item.id, -math.inf) - item.logprob
        for answer, probe in zip(answers, probes, strict=True)
        for item in probe.top
    ]
    return math.hypot(*errors) / math.sqrt(len(errors))


REPLAY: Final = ProofReplay(replay, rehearse)
