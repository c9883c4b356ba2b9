"""``python -m loramux_prove``: what adapters should answer, computed by the reference.

One JSON object comes in on stdin, one goes out on stdout::

    {"base": DIR, "max_seq_len": null, "threads": null,
     "adapters": {NAME: {"folder": DIR, "truncate_to": null}}}
    {"proofs": {NAME: {"probes": [...], "effects": [[LAYER, MODULE, EFFECT], ...]}}}
    {"fault": {"reason": "CHECKPOINT_INVALID", "message": "..."}}

The builder runs it where torch is installed; it never imports torch itself.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from loramux_prove.adapter_source import read_adapter
from loramux_prove.fingerprint import effect_of
from loramux_prove.reference import Reference, Run
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.read import read_config
from loramux_shared.bundle.proof import PROBE_LENGTHS, Probe, ProbeLogprob
from loramux_shared.faults import Fault

TOP: Final = 16
"""Tokens whose log probability is kept."""


def main() -> int:
    """Answer the request on stdin; returns the exit status."""
    request = json.load(sys.stdin)  # noqa: TID251 - a process of ours asks
    if request.get("threads"):
        torch.set_num_threads(request["threads"])
    try:
        answer = {"proofs": prove(Path(request["base"]), request["adapters"], request.get("max_seq_len"))}
    except Fault as fault:
        answer = {"fault": {"reason": fault.reason, "message": fault.message}}
    json.dump(answer, sys.stdout)
    return 0


def prove(
    base: Path, adapters: Mapping[str, Mapping[str, Any]], max_seq_len: int | None = None
) -> dict[str, Any]:
    """Return the proofs of adapters by their names.

    Raises:
        CheckpointInvalid: the base cannot be served.
    """
    config = read_config(base, max_seq_len)
    reference = Reference(config, base)
    read = {
        name: read_adapter(Path(each["folder"]), config, each.get("truncate_to"), base)
        for name, each in adapters.items()
    }
    probes = {name: probe_tokens(config, reference.replaced(adapter)) for name, adapter in read.items()}
    runs = reference.run(probes, read)
    return {name: _proof(probes[name], runs[name]) for name in adapters}


def probe_tokens(config: ModelConfig, replaced: Sequence[int] = ()) -> list[list[int]]:
    """Return the sequences: tokens spread over the part of a vocabulary where words are.

    Of an adapter with other embeddings for some tokens, every second one, and the last, is one of those.
    """
    vocab, drawn = config.dims.vocab, 0
    low, high = vocab // 50, max(vocab // 50 + 2, vocab // 3)
    sequences = []
    for length in PROBE_LENGTHS:
        sequence = []
        for _ in range(min(length, config.max_positions)):
            drawn += 1
            sequence.append(low + (drawn * 7919) % (high - low))
        if replaced:
            for at in range(len(sequence) - 1, -1, -2):
                drawn += 1
                sequence[at] = replaced[(drawn * 7919) % len(replaced)]
        sequences.append(sequence)
    return sequences


def _proof(probes: Sequence[Sequence[int]], runs: Sequence[Run]) -> dict[str, Any]:
    places = sorted(runs[0].added)
    effects = [
        [layer, module, effect_of(torch.cat([run.added[layer, module] for run in runs])).model_dump()]
        for layer, module in places
    ]
    recorded = [_probe(tokens, run).model_dump() for tokens, run in zip(probes, runs, strict=True)]
    return {"probes": recorded, "effects": effects}


def _probe(tokens: Sequence[int], run: Run) -> Probe:
    logprobs = torch.log_softmax(run.logits.double(), dim=-1)
    best = logprobs.topk(min(TOP, len(logprobs)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Probe(
        tokens=tuple(tokens), top=tuple(ProbeLogprob(id=id_, logprob=round(value, 5)) for id_, value in pairs)
    )


if __name__ == "__main__":
    sys.exit(main())
