"""The packing of a verified bundle for a backend's bank; proved once per digest and process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Final

import structlog
import torch

from inference_service.adapters.recent import Recent
from inference_service.backends.base import LoraBackend
from inference_service.core.adapter import Adapter
from inference_service.engine.graph_runner import ROOM
from inference_service.kernels.launch import stream_of
from inference_service.lora.packed import PackedAdapter
from inference_service.lora.places import ALIGNMENT
from inference_service.lora.weights import AdapterWeights, load_adapter, values_of
from inference_service.models.decoder import Decoder
from inference_service.proof.replay import replay
from loramux_shared.bundle.reader import Bundle
from loramux_shared.faults import ResourcesExhausted

log = structlog.get_logger()

ARRANGED_BYTES: Final = 32 << 20
"""Bytes of the arrangements of bundles that were packed before: those of 6,000 adapters of a small
dense base.
"""
DIGEST_DIGITS: Final = 12
"""Characters of a digest that stand for an adapter where its name is not known."""


class Packer:
    """Packs adapters for a replica's bank. Calls may come from any thread, one at a time for one digest.

    Proofs run through the model as it is, but with a bank and a cache of their own, so that the replica's are
    neither filled nor waited for.
    """

    def __init__(
        self,
        model: Decoder,
        lora: LoraBackend,
        new_lora: Callable[[], LoraBackend],
        block_size: int,
        max_rank: int = 1,
    ) -> None:
        """Take the parts of the replica; max_rank is the one that its bank was opened for.

        Proofs have it too, so that one of a new rank launches no kernel that has to be compiled first.
        """
        self._model = model
        self._lora = lora
        self._new_lora = new_lora
        self._block_size, self._max_rank = block_size, max_rank
        self._proved: set[str] = set()
        self._arranged: Recent[AdapterWeights] = Recent(ARRANGED_BYTES)
        self._proving = threading.Lock()  # operations may cache what a step of one thread prepared

    def __call__(self, bundle: Bundle) -> PackedAdapter:
        """Pack a bundle.

        Raises:
            BundleCorrupt: it has rows that the base has no place for.
            ResourcesExhausted: it has more tokens of its own than recorded steps have room for.
            ProofFailed: the adapter answers otherwise than its proof says.
        """
        config = self._model.config
        room = (bundle.manifest.vocab or 0) - config.dims.vocab
        if room > ROOM and self._model.device.type == "cuda":
            raise ResourcesExhausted(
                f"the adapter has {room} tokens more than the base, and a GPU's steps have room for {ROOM}. "
                "Train it with fewer, or merge it into the base and serve a full model."
            )
        packed = self._lora.pack(self._weights(bundle))
        if bundle.digest not in self._proved:
            self._prove(bundle, packed)
            self._proved.add(bundle.digest)
        return packed

    def _weights(self, bundle: Bundle) -> AdapterWeights:
        """Return what a bundle holds; where each matrix lies is known from the first time."""
        dtype, home = self._model.dtype, self._lora.home
        known = self._arranged.get(bundle.digest)
        if known is not None:
            return replace(known, values=values_of(bundle, dtype, home))
        weights = load_adapter(bundle, self._model.config.layer_groups, dtype, home)
        if weights.vocabulary is None and not weights.vectors:  # the bundle has all tensors
            size = weights.ranks.nbytes + weights.first_a.nbytes + weights.first_b.nbytes
            self._arranged.put(bundle.digest, replace(weights, values=torch.empty(0)), size)
        return weights

    def _prove(self, bundle: Bundle, packed: PackedAdapter) -> None:
        manifest, began = bundle.manifest, time.monotonic()
        if manifest.proof is None:
            return
        short = bundle.digest[:DIGEST_DIGITS]
        with self._proving, _beside_the_steps(self._model.device):
            lora = self._new_lora()
            num_bytes = -(-packed.num_bytes // ALIGNMENT) * ALIGNMENT
            lora.open(num_bytes, max(packed.max_rank, self._max_rank), 1)
            lora.copy(packed, 0)
            lora.enter(0, 0, packed)
            adapter = Adapter(bundle.digest, 0)
            replayed = replay(short, manifest.proof, manifest, adapter, lora, self._model, self._block_size)
        log.info(
            "adapter passed its proof",
            adapter=short,
            effect=replayed.effect,
            logprob=replayed.logprob,
            seconds=round(time.monotonic() - began, 3),
        )


def _beside_the_steps(device: torch.device) -> AbstractContextManager[object]:
    """Compute on the stream of proofs, where there are streams: on the steps' they would wait."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(stream_of("proofs", device))
