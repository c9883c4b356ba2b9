"""Replays the proof of an adapter through the engine's own path, before the adapter is served.

Two things are compared: the log probabilities of the most likely tokens behind each probe, and for every row of
the bundle what it adds to its module's output. The first would show whatever is wrong with base and adapter
together, but in bfloat16 the rounding of a whole model hides one wrong row of hundreds. The second is about one
row at a time: zeroed, doubled or exchanged, it is off by its own size, and rounding moves it by a few percent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from inference_service.core.batch import Batch, Chunk
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Adapter, Token
from inference_service.core.sequence import Sequence as EngineSequence
from inference_service.engine.runner import Runner
from inference_service.lora.backend import LoraBackend
from inference_service.lora.segments import Arrangement
from inference_service.lora.weights import AdapterWeights
from inference_service.models.decoder import Decoder
from inference_service.models.fingerprint import difference, effect_of
from shared.bundle.manifest import Manifest
from shared.bundle.proof import Probe, Proof
from shared.deployment import Dtype
from shared.faults import ProofFailed


@dataclass(frozen=True)
class Tolerance:
    """How far a replay may be from its proof."""

    logprob: float
    """Absolute, of any token that the proof names."""
    effect: float
    """Relative to the row's norm."""


TOLERANCES: Final[Mapping[Dtype, Tolerance]] = {
    Dtype.FLOAT32: Tolerance(logprob=0.01, effect=0.005),
    Dtype.FLOAT16: Tolerance(logprob=0.25, effect=0.1),
    Dtype.BFLOAT16: Tolerance(logprob=1.0, effect=0.3),
}
"""By the coarser of the bundle's storage type and the replica's type; see docs/decisions/0005-proofs.md."""
_TORCH: Final = {
    torch.float32: Dtype.FLOAT32,
    torch.float16: Dtype.FLOAT16,
    torch.bfloat16: Dtype.BFLOAT16,
}
_COARSE: Final = (Dtype.FLOAT32, Dtype.FLOAT16, Dtype.BFLOAT16)
WIDE: Final = 2048
"""Most likely tokens of a replay among which the proof's are looked for."""


@dataclass(frozen=True)
class Replayed:
    """How far a replay was from its proof, and what is allowed."""

    logprob: float
    effect: float
    allowed: Tolerance


class _Recorder:
    """A backend that also remembers what the adapter added at the probes' last rows."""

    def __init__(self, inner: LoraBackend, rows: Sequence[int], model: Decoder) -> None:
        self.name = inner.name
        self.home = inner.home
        self._inner = inner
        self._rows = list(rows)
        self._groups = {group.name: group for group in model.config.groups}
        self.added: dict[tuple[int, str], Tensor] = {}

    def load(self, weights: AdapterWeights) -> int:
        """Take an adapter in."""
        return self._inner.load(weights)

    def begin(self, arrangement: Arrangement) -> None:
        """Prepare for the rows of a step."""
        self._inner.begin(arrangement)

    def apply(self, x: Tensor, out: Tensor, layer: int, group: str) -> None:
        """Add what the adapter makes of x, and keep it."""
        alone = torch.zeros_like(out)
        self._inner.apply(x, alone, layer, group)
        shape = self._groups[group]
        parts = torch.split(alone[self._rows], list(shape.out_features), dim=-1)
        for module, part in zip(shape.modules, parts, strict=True):
            self.added[layer, module] = part
        self._inner.apply(x, out, layer, group)


def replay(
    name: str, proof: Proof, manifest: Manifest, adapter: Adapter, lora: LoraBackend, model: Decoder, block: int
) -> Replayed:
    """Replay an adapter's proof.

    Raises:
        ProofFailed: the adapter answers otherwise; the message names it, the worst difference and the limit.
    """
    allowed = TOLERANCES[max(manifest.dtype, _TORCH[model.dtype], key=_COARSE.index)]
    _expect_sound(name, proof, manifest, model.config.dims.vocab)
    ends = torch.tensor([len(probe.tokens) for probe in proof.probes]).cumsum(0) - 1
    recorder = _Recorder(lora, ends.tolist(), model)
    answers = _run(proof.probes, adapter, recorder, model, block)
    worst_row, effect = 0, 0.0
    for index, (row, expected) in enumerate(zip(manifest.rows, proof.effects, strict=True)):
        off = difference(effect_of(recorder.added[row.layer, row.module]), expected)
        if off > effect:
            worst_row, effect = index, off
    if effect > allowed.effect:
        row = manifest.rows[worst_row]
        raise ProofFailed(
            f"adapter {name!r}: layer {row.layer} {row.module} adds something else than its proof says: "
            f"relative difference {effect:.3g}, at most {allowed.effect:g} is rounding. {_CURE}"
        )
    logprob = max(map(_logprob_difference, answers, proof.probes))
    if logprob > allowed.logprob:
        raise ProofFailed(
            f"adapter {name!r}: log probabilities differ from its proof by {logprob:.3g}, "
            f"at most {allowed.logprob:g} is rounding. {_CURE}"
        )
    return Replayed(logprob, effect, allowed)


_CURE: Final = "Build the deployment again; if it stays, this replica computes wrongly: please report it."


def _expect_sound(name: str, proof: Proof, manifest: Manifest, vocab: int) -> None:
    ids = [*(token for probe in proof.probes for token in probe.tokens)]
    ids += [item.id for probe in proof.probes for item in probe.top]
    if len(proof.effects) != len(manifest.rows) or max(ids) >= vocab:
        raise ProofFailed(f"adapter {name!r}: its proof is about another bundle or another base. {_CURE}")


def _run(
    probes: Sequence[Probe], adapter: Adapter, lora: LoraBackend, model: Decoder, block: int
) -> list[Token]:
    """Compute all probes in one step of a runner of their own; return each one's answer."""
    seqs, chunks, blocks = [], [], 0
    sampling = SamplingParams(max_tokens=1, logprobs=min(WIDE, model.config.dims.vocab))
    for index, probe in enumerate(probes):
        seq = EngineSequence(f"probe {index}", list(probe.tokens), sampling, adapter)
        need = math.ceil(len(probe.tokens) / block)
        seq.blocks = list(range(blocks, blocks + need))
        blocks += need
        seqs.append(seq)
        chunks.append(Chunk(seq, len(probe.tokens)))
    answers = dict(Runner(model, lora, blocks, block).run(Batch(tuple(chunks))))
    return [answers[seq] for seq in seqs]


def _logprob_difference(answer: Token, probe: Probe) -> float:
    """The largest; infinite where a token of the proof is not even among the most likely ones."""
    found = dict(answer.top)
    return max(abs(found.get(item.id, -math.inf) - item.logprob) for item in probe.top)
