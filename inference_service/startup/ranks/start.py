"""The ranks of a replica from its start on: the base read by all of them, banks, runners."""

from typing import cast

import torch

from inference_service.adapters.loader import Pack
from inference_service.engine.backends.base import LoraBackend
from inference_service.engine.backends.operations import Backend
from inference_service.engine.backends.triton_lora import TritonLora
from inference_service.engine.execution.graphs import CudaRecorder
from inference_service.engine.execution.runner import Blocks, Runner
from inference_service.engine.models.decoder import Decoder
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.engine.scheduling.residents import BankMemory
from inference_service.startup.model import read_model
from inference_service.startup.ranks.group import group_of
from inference_service.startup.ranks.host import RankHost
from inference_service.startup.ranks.work import RankedBank, RankedGraphRunner, RankedPacker, RankedRunner
from loramux_shared.bases.shard import Shard
from loramux_shared.bundle.generation import Generation
from loramux_shared.settings import InferenceSettings
from loramux_shared.sources.checkpoint import PlacedBase


class ReplicaRanks(RankHost):
    """The other ranks, as the start of a replica asks them."""

    def open_bank(self, lora: LoraBackend, pack: Pack, *sizes: int) -> tuple[Pack, BankMemory]:
        """Open all ranks' banks with sizes of `LoraBackend.open`; return what packs for them, and the bank."""
        others = self.ask("open", *sizes)
        lora.open(*sizes)
        others()
        return RankedPacker(pack, self), RankedBank(lora, self)

    def runner(
        self,
        model: Decoder,
        lora: LoraBackend,
        blocks: Blocks,
        block_size: int,
        recorded: SchedulerLimits | None,
        slots: int,
        depth: int | None,
    ) -> Runner:
        """Return a runner of steps that all ranks compute, and record within limits where there are some."""
        if recorded is None:
            return RankedRunner(model, lora, blocks, block_size, slots, self, depth=depth)
        recorder, segmented = CudaRecorder(model.device), cast(TritonLora, lora)
        return RankedGraphRunner(
            model, segmented, blocks, block_size, recorded, recorder, slots, self, depth=depth
        )


def read_with_ranks(
    placed: PlacedBase, shard: Shard, backend: Backend, settings: InferenceSettings, generation: Generation
) -> tuple[ReplicaRanks, Decoder]:
    """Start the other ranks, read the first one's part while they read theirs, and meet them.

    Raises:
        ReplicaFailed: a rank ended, or was silent for too long.
        Fault: what `read_model` raises, here or on a rank.
    """
    cards = torch.cuda.device_count() if backend.device.type == "cuda" else 0
    host = ReplicaRanks(shard.world, cards=cards)
    ranks = group_of(shard, backend.operations, host.memory)
    with host.ending_where_it_raises():
        dumped = settings.model_dump(mode="json", exclude={"api_keys"})
        facts = {"settings": dumped, "generation": generation.model_dump_json()}
        facts |= {"folder": str(placed.folder), "cache": str(placed.cache), "meeting": str(host.meeting)}
        facts |= {"operations": type(backend.operations).__name__}
        others = host.ask("load", facts)
        model = read_model(placed, shard.whole, backend, ranks)
        others()
        ranks.meet(host.meeting, backend.device, settings.step_timeout_s)
        host.leave_by(ranks.close)
    return host, model
