"""Replays the proof of an adapter through the engine's own path, before the adapter is served.

Two things are compared: the log probabilities of the most likely tokens behind each probe, and for every row of
the bundle what it adds to its module's output. The first would show whatever is wrong with base and adapter
together, but in bfloat16 the rounding of a whole model hides one wrong row of hundreds. The second is about one
row at a time: zeroed, doubled or exchanged, it is off by its own size, and rounding moves it by a few percent.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from inference_service.backends.base import StepLora
from inference_service.core.adapter import Adapter
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, Chunk, Sequence as EngineSequence, Token
from inference_service.engine.runner import Runner
from inference_service.models.decoder import Decoder
from inference_service.proof.fingerprint import EMBEDDING, difference, effect_of
from inference_service.proof.recorder import ProbeRecorder
from loramux_shared.bundle.manifest import Manifest
from loramux_shared.bundle.modules import NO_LAYER
from loramux_shared.bundle.proof import Effect, Probe, Proof
from loramux_shared.deployment import Dtype
from loramux_shared.faults import ProofFailed
from loramux_shared.runtime import Rounding


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
    answers = _run(proof.probes, adapter, recorder, model, block)
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
    logprob = _logprob_difference(answers, proof.probes)
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


def _run(probes: Sequence[Probe], adapter: Adapter, lora: StepLora, model: Decoder, block: int) -> list[Token]:
    """Compute all probes in one step of a runner of their own; return each one's answer."""
    seqs, chunks, blocks = [], [], 0
    sampling = SamplingParams(max_tokens=1, logprobs=min(WIDE, model.config.dims.vocab))
    for index, probe in enumerate(probes):
        seq = EngineSequence(f"probe {index}", list(probe.tokens), sampling, adapter)
        need = math.ceil(len(probe.tokens) / block)
        seq.progress.blocks, seq.progress.state_slot = array("i", range(blocks, blocks + need)), index
        blocks += need
        seqs.append(seq)
        chunks.append(Chunk(seq, len(probe.tokens)))
    answers = dict(Runner(model, lora, blocks, block, len(probes)).run(Batch(tuple(chunks))))
    return [answers[seq] for seq in seqs]


def _logprob_difference(answers: Sequence[Token], probes: Sequence[Probe]) -> float:
    """Infinite where a token of the proof is not even among the most likely ones."""
    errors = [
        dict(answer.top).get(item.id, -math.inf) - item.logprob
        for answer, probe in zip(answers, probes, strict=True)
        for item in probe.top
    ]
    return math.hypot(*errors) / math.sqrt(len(errors))
