"""The service that the gateway SMG speaks to: ``vllm.grpc.engine.VllmEngine``.

Its messages have no field for a model, so a port stands for one: for the base, or for the model that it was
opened with.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Final

import grpc

from inference_service.adapters.served_model import AdapterDefaults
from inference_service.rpc.mapping import texts_of
from inference_service.serving.pooling import pooled, pooling_of, shaped
from inference_service.serving.service import GenerationService
from loramux_shared.faults import Fault
from loramux_vllm_grpc.calling import MODEL, refuse_rank
from loramux_vllm_grpc.engine_answers import Telling
from loramux_vllm_grpc.engine_requests import embedding_of, request_of
from loramux_vllm_grpc.loads import loads
from loramux_vllm_grpc.refusals import refused, refused_stream, spelled_out
from loramux_vllm_grpc.running import Running
from loramux_vllm_grpc.tokenizer import Archives
from loramux_vllm_grpc.wire import common_pb2, engine_pb2 as pb, engine_pb2_grpc

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name
SERVER_TYPE: Final = "vllm-grpc"
"""The dialect."""


class VllmEngineServicer(engine_pb2_grpc.VllmEngineServicer):
    """Translates messages and nothing else; faults become statuses in the server's interceptor."""

    def __init__(
        self,
        service: GenerationService,
        running: Running,
        archives: Archives,
        healthy: Callable[[], bool],
        *,
        dtype: str = "",
        model: str = "",
    ) -> None:
        """Answer with a model, any name of one; empty: with the base, unless a call's metadata name another."""
        self._service = service
        self._running = running
        self._archives = archives
        self._healthy = healthy
        self._dtype = dtype
        self._model = model
        self._started_s = time.monotonic()

    def register(self, server: grpc.aio.Server) -> None:
        """Add the service to a server."""
        engine_pb2_grpc.add_VllmEngineServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    async def Generate(  # noqa: N802 - grpc's name
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Stream an answer, or several; nothing is sent before the first token."""
        with spelled_out():
            parsed = request_of(request, context, self._name(context), self._service.limits.max_seq_len)
            telling = Telling(parsed, stream=request.stream)
            with self._running.call(parsed.id) as call:
                async with aclosing(call.until_aborted(self._service.generate(parsed))) as events:
                    async for event in events:
                        for message in telling.messages(event):
                            yield message
                for message in telling.aborted() if call.aborted else ():
                    yield message

    async def Embed(  # noqa: N802 - grpc's name
        self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> pb.EmbedResponse:
        """Make a vector of a prompt: its hidden states, pooled as the base was trained, of length 1."""
        with spelled_out():
            pooling = pooling_of(None, self._service.usual_pooling, self._service.poolings)
            longest = self._service.limits.max_seq_len
            parsed = embedding_of(request, context, self._name(context), longest, pooling)
            async with aclosing(pooled(self._service, [parsed])) as found:
                made = await anext(found)
        vector = shaped(made.vector, None, normalize=True)
        return pb.EmbedResponse(
            embedding=vector.tolist(), prompt_tokens=made.finished.prompt_tokens, embedding_dim=len(vector)
        )

    async def HealthCheck(  # noqa: N802 - grpc's name
        self, _request: pb.HealthCheckRequest, _context: grpc.aio.ServicerContext
    ) -> pb.HealthCheckResponse:
        """Say whether requests are taken, and there is a model to answer them."""
        if not self._healthy():
            return pb.HealthCheckResponse(message="no requests are taken")
        try:
            self._service.catalog.resolve(self._model or self._service.catalog.base_name)
        except Fault as fault:
            return pb.HealthCheckResponse(message=fault.reason)
        return pb.HealthCheckResponse(healthy=True)

    async def Abort(  # noqa: N802 - grpc's name
        self, request: pb.AbortRequest, _context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        """End requests of the same caller; ids that are not under way are none."""
        self._running.abort(request.request_ids)
        return pb.AbortResponse()

    async def GetModelInfo(  # noqa: N802 - grpc's name
        self, _request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        """Describe the model that answers here."""
        model = self._service.catalog.resolve(self._name(context))
        defaults = await self._service.naming.defaults(model)
        config = await asyncio.to_thread(self._archives.files.config)
        longest = self._service.limits.max_seq_len
        return pb.GetModelInfoResponse(
            model_path=self._source(),
            tokenizer_path=self._source(),
            served_model_name=self._name(context),
            is_generation=True,
            max_context_length=longest,
            max_req_input_len=longest - 1,
            vocab_size=model.vocab or self._service.text.vocab,
            model_type=str(config.get("model_type", "")),
            architectures=[str(name) for name in config.get("architectures") or ()],
            eos_token_ids=sorted(self._service.limits.eos_token_ids | defaults.stop_token_ids),
            bos_token_id=_token(config, "bos_token_id"),
            pad_token_id=_token(config, "pad_token_id"),
            default_sampling_params_json=_sampling(defaults),
        )

    async def GetServerInfo(  # noqa: N802 - grpc's name
        self, _request: pb.GetServerInfoRequest, _context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        """Describe the replica."""
        stats = self._service.engine.stats
        return pb.GetServerInfoResponse(
            active_requests=self._service.in_work,
            is_paused=self._service.engine.paused,
            uptime_seconds=time.monotonic() - self._started_s,
            server_type=SERVER_TYPE,
            data_parallel_size=1,
            block_size=stats.block_size,
            model_dtype=f"torch.{self._dtype}" if self._dtype else "",
            max_num_seqs=stats.seats,
            constrained_decoding_start="first_token",
        )

    async def GetLoads(  # noqa: N802 - grpc's name
        self, request: pb.GetLoadsRequest, _context: grpc.aio.ServicerContext
    ) -> pb.GetLoadsResponse:
        """Return how full the replica is, whichever sections the request names."""
        refuse_rank(request.dp_rank, "dp_rank")
        answer = loads(self._service.engine)
        return pb.GetLoadsResponse(
            timestamp=answer["timestamp"],
            version=answer["version"],
            dp_rank_count=answer["dp_rank_count"],
            loads=[pb.SchedulerLoad(**load) for load in answer["loads"]],
        )

    async def GetTokenizer(  # noqa: N802 - grpc's name
        self, _request: common_pb2.GetTokenizerRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[common_pb2.GetTokenizerChunk]:
        """Stream the base's tokenizer, with the chat template and the tokens of what answers here."""
        model = self._service.catalog.resolve(self._name(context))
        defaults = await self._service.naming.defaults(model)
        archive = await self._archives.get(defaults.template.source if defaults.template else "", defaults.text)
        for data, sha256 in archive.chunks():
            yield common_pb2.GetTokenizerChunk(data=data, sha256=sha256)

    FlushCache = refused(
        "FlushCache", "the prefix cache is kept per version of an adapter, so it needs no flush."
    )
    StartProfile = refused("StartProfile", "profile the process; its metrics: docs/reference/metrics.md.")
    StopProfile = refused("StopProfile", "no profile runs.")
    SubscribeKvEvents = refused_stream("SubscribeKvEvents", "there are no events of the cache; ask GetLoads.")

    def _name(self, context: grpc.aio.ServicerContext) -> str:
        """Return the name of what answers a call."""
        return self._model or texts_of(context).get(MODEL) or self._service.catalog.base_name

    def _source(self) -> str:
        """Return the base's repository, as it may be reported."""
        catalog = self._service.catalog
        return next((model.source for model in catalog.everything if model.name == catalog.base_name), "")


def _token(config: Any, name: str) -> int:
    """Return a token of ``config.json``; 0 where it names none, or several, as vLLM does."""
    value = config.get(name)
    return value if isinstance(value, int) else 0


def _sampling(defaults: AdapterDefaults) -> str:
    values = {name: getattr(defaults, name) for name in ("temperature", "top_p", "top_k")}
    defined = {name: value for name, value in values.items() if value is not None}
    return json.dumps(defined) if defined else ""
