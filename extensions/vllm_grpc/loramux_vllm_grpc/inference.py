"""vLLM's own service for answers: ``vllm.Inference``."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Final

import grpc

from inference_service.serving.request import AnswerStarted, Request
from inference_service.serving.service import GenerationService
from loramux_shared.faults import Finding, RequestInvalid
from loramux_vllm_grpc.inference_answers import Telling, whole
from loramux_vllm_grpc.inference_requests import request_of
from loramux_vllm_grpc.refusals import spelled_out
from loramux_vllm_grpc.running import Running
from loramux_vllm_grpc.wire import inference_pb2 as pb, inference_pb2_grpc

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["Inference"].full_name


class VllmInferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Translates messages and nothing else; faults become statuses in the server's interceptor."""

    def __init__(self, service: GenerationService, running: Running) -> None:
        self._service = service
        self._running = running

    def register(self, server: grpc.aio.Server) -> None:
        """Add the service to a server."""
        inference_pb2_grpc.add_InferenceServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    async def Generate(  # noqa: N802 - grpc's name
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateResponse:
        """Answer once; there is room for a single answer."""
        with spelled_out():
            parsed = self._parsed(request, context)
            if parsed.output.n > 1:
                raise _too_many(parsed.output.n)
            async with aclosing(self._parts(parsed, request)) as messages:
                return whole([message async for message in messages])

    async def GenerateStream(  # noqa: N802 - grpc's name
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.GenerateResponse]:
        """Answer as it goes."""
        with spelled_out():
            async with aclosing(self._parts(self._parsed(request, context), request)) as messages:
                async for message in messages:
                    yield message

    def _parsed(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> Request:
        parsed = request_of(request, context, self._service.limits.max_seq_len)
        base = self._service.catalog.base_name
        return parsed if parsed.model.name else replace(parsed, model=replace(parsed.model, name=base))

    async def _parts(self, parsed: Request, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse]:
        """Yield the messages of a request; the message of the prompt alone waits for the first token."""
        telling = Telling(parsed, request.response)
        held: list[pb.GenerateResponse] = []
        with self._running.call(parsed.id) as call:
            async with aclosing(call.until_aborted(self._service.generate(parsed))) as events:
                async for event in events:
                    held += telling.messages(event)
                    if isinstance(event, AnswerStarted):
                        own = (await self._service.naming.defaults(event.model)).stop_token_ids
                        telling.ends = self._service.limits.eos_token_ids | own
                        continue
                    for message in held:
                        yield message
                    held = []
            for message in (*held, *telling.aborted()) if call.aborted else ():
                yield message


def _too_many(count: int) -> RequestInvalid:
    finding = Finding(code="E_BAD_FIELD", where="sampling.num_sequences", expected="1", found=str(count))
    return RequestInvalid("Generate has room for one answer. Use GenerateStream.", [finding])
