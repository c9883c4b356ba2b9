"""vLLM's own door for operators and gateways: ``vllm.Control``."""

from __future__ import annotations

import uuid
from importlib.metadata import version
from typing import Final

import grpc

from inference_service.adapters.manager import MAX_PAGE, AdapterManager
from inference_service.serving.pausing import PauseMode
from inference_service.serving.service import GenerationService
from inference_service.vllm_rpc.refusals import refuse_fields, refused, spelled_out
from inference_service.vllm_rpc.running import Running
from loramux.vllm import control_pb2 as pb
from loramux.vllm import control_pb2_grpc
from loramux_shared.faults import Finding, RequestInvalid

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["Control"].full_name
API_VERSION: Final = "vllm"
PROTO_VERSION: Final = "0.6.0"
"""Of the messages that are written down in protos/loramux/vllm."""
ID_DIGITS: Final = 15
"""Of a digest, in hex: what an int64 holds."""
MODES: Final = {
    pb.PAUSE_MODE_UNSPECIFIED: PauseMode.ABORT,
    pb.PAUSE_MODE_ABORT: PauseMode.ABORT,
    pb.PAUSE_MODE_WAIT: PauseMode.WAIT,
    pb.PAUSE_MODE_KEEP: PauseMode.KEEP,
}
AWAKE: Final = "a replica does not sleep; pause it, or end it with SIGTERM."
FIXED: Final = "the weights of a base never change, and those of an adapter come with LoadLora."


class VllmControlServicer(control_pb2_grpc.ControlServicer):
    """Translates messages and nothing else; faults become statuses in the server's interceptor."""

    def __init__(self, service: GenerationService, adapters: AdapterManager, running: Running) -> None:
        self._service = service
        self._adapters = adapters
        self._running = running
        self._instance = uuid.uuid4().hex

    async def GetServerInfo(  # noqa: N802 - grpc's name
        self, _request: pb.GetServerInfoRequest, _context: grpc.aio.ServicerContext
    ) -> pb.ServerInfo:
        """Describe the replica: one device, and no learning."""
        stats = self._service.engine_view.stats
        return pb.ServerInfo(
            engine_version=version("loramux"),
            api_version=API_VERSION,
            instance_id=self._instance,
            parallelism=pb.ParallelismInfo(
                tensor_parallel_size=1,
                pipeline_parallel_size=1,
                data_parallel_size=1,
                decode_context_parallel_size=1,
                world_size=1,
                data_parallel_size_local=1,
            ),
            max_model_len=self._service.limits.max_seq_len,
            kv_block_size=stats.block_size,
            total_kv_blocks=stats.blocks_total,
            max_running_requests=stats.seats,
            max_loras=stats.max_adapters,
            rl_capabilities=pb.RlCapabilities(),
            proto_version=PROTO_VERSION,
            effective_attention_block_size=stats.block_size,
        )

    async def GetModelInfo(  # noqa: N802 - grpc's name
        self, _request: pb.GetModelInfoRequest, _context: grpc.aio.ServicerContext
    ) -> pb.ModelInfo:
        """Describe the base."""
        name = self._service.catalog.base_name
        source = next((model.source for model in self._service.catalog.everything if model.name == name), "")
        return pb.ModelInfo(
            model_id=source or name,
            served_model_name=name,
            supports_text_input=True,
            supports_token_ids_input=True,
            supports_lora=True,
        )

    async def Abort(  # noqa: N802 - grpc's name
        self, request: pb.AbortRequest, _context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        """End requests of the same caller; ids that are not under way are none."""
        self._running.abort(request.request_ids)
        return pb.AbortResponse()

    async def LoadLora(  # noqa: N802 - grpc's name
        self, request: pb.LoadLoraRequest, _context: grpc.aio.ServicerContext
    ) -> pb.LoadLoraResponse:
        """Add an adapter; its name must be free, as in vLLM."""
        with spelled_out():
            _require(request, "lora_name", "source_path")
            await self._adapters.load(request.lora_name, request.source_path)
        return pb.LoadLoraResponse(adapter=self._adapter(request.lora_name))

    async def UnloadLora(  # noqa: N802 - grpc's name
        self, request: pb.UnloadLoraRequest, _context: grpc.aio.ServicerContext
    ) -> pb.UnloadLoraResponse:
        """Take a name away, and tell what it stood for."""
        _require(request, "lora_name")
        adapter = self._adapter(request.lora_name)
        await self._adapters.unload(request.lora_name)
        return pb.UnloadLoraResponse(adapter=adapter)

    async def ListLoras(  # noqa: N802 - grpc's name
        self, _request: pb.ListLorasRequest, _context: grpc.aio.ServicerContext
    ) -> pb.ListLorasResponse:
        """List all adapters by name."""
        names: list[str] = []
        after = ""
        while True:
            page = self._adapters.list(after, MAX_PAGE)
            names += [view.name for view in page.adapters]
            after = page.next_page
            if not after:
                return pb.ListLorasResponse(adapters=map(self._adapter, names))

    async def GetKvEventSources(  # noqa: N802 - grpc's name
        self, _request: pb.GetKvEventSourcesRequest, _context: grpc.aio.ServicerContext
    ) -> pb.GetKvEventSourcesResponse:
        """Name none."""
        return pb.GetKvEventSourcesResponse()

    async def PauseGeneration(  # noqa: N802 - grpc's name
        self, request: pb.PauseGenerationRequest, _context: grpc.aio.ServicerContext
    ) -> pb.PauseGenerationResponse:
        """Let requests stand still, end, or be ended; new ones wait."""
        refuse_fields(request, {})
        if request.mode not in MODES:
            finding = Finding(code="E_BAD_FIELD", where="mode", expected="0 to 3", found=str(request.mode))
            raise RequestInvalid("the server cannot pause in that way.", [finding])
        await self._service.engine_view.pause(MODES[request.mode])
        return pb.PauseGenerationResponse()

    async def ResumeGeneration(  # noqa: N802 - grpc's name
        self, _request: pb.ResumeGenerationRequest, _context: grpc.aio.ServicerContext
    ) -> pb.ResumeGenerationResponse:
        """Go on with everything that stands still or waits."""
        self._service.engine_view.resume()
        return pb.ResumeGenerationResponse()

    async def IsPaused(  # noqa: N802 - grpc's name
        self, _request: pb.IsPausedRequest, _context: grpc.aio.ServicerContext
    ) -> pb.IsPausedResponse:
        """Say whether requests stand still."""
        return pb.IsPausedResponse(paused=self._service.engine_view.paused)

    async def IsSleeping(  # noqa: N802 - grpc's name
        self, _request: pb.IsSleepingRequest, _context: grpc.aio.ServicerContext
    ) -> pb.IsSleepingResponse:
        """Say no."""
        return pb.IsSleepingResponse()

    Shutdown = refused("Shutdown", "whoever started the replica ends it, with SIGTERM.")
    Sleep = refused("Sleep", AWAKE)
    WakeUp = refused("WakeUp", AWAKE)
    InitWeightTransferEngine = refused("InitWeightTransferEngine", FIXED)
    StartWeightUpdate = refused("StartWeightUpdate", FIXED)
    StartDraftWeightUpdate = refused("StartDraftWeightUpdate", FIXED)
    UpdateWeights = refused("UpdateWeights", FIXED)
    FinishWeightUpdate = refused("FinishWeightUpdate", FIXED)
    UpdateWeightVersion = refused("UpdateWeightVersion", FIXED)
    GetWeightVersion = refused("GetWeightVersion", "each adapter has a version of its own: ListLoras.")

    def _adapter(self, name: str) -> pb.LoraAdapter:
        view = self._adapters.get(name)
        return pb.LoraAdapter(
            lora_id=lora_id(view.digest),
            lora_name=view.name,
            source_path=self._service.catalog.get(name).source,
        )


def lora_id(digest: str) -> int:
    """Return the number of a version, from its digest."""
    return int(digest[:ID_DIGITS], 16)


def register(servicer: VllmControlServicer, server: grpc.aio.Server) -> None:
    """Add the service to a server."""
    control_pb2_grpc.add_ControlServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]


def _require(request: pb.LoadLoraRequest | pb.UnloadLoraRequest, *names: str) -> None:
    """Refuse a request that has more than its fields, or not all of them.

    Raises:
        RequestInvalid: it is so.
    """
    refuse_fields(request, {})
    missing = [name for name in names if not getattr(request, name)]
    if missing:
        findings = [Finding(code="E_MISSING_FIELD", where=name, expected="a value") for name in missing]
        raise RequestInvalid(f"the request lacks {' and '.join(missing)}.", findings)
