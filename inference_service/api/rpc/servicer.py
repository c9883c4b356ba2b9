"""The gRPC servicer of inference."""

from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc

from inference_service.api.requests.pooling import check_dimensions, pooled, pooling_of, scored, shaped
from inference_service.api.requests.service import GenerationService
from inference_service.api.rpc.mapping import event_to_messages, model_to_message, request_from_message
from inference_service.api.rpc.pooling import (
    requested_pooling,
    requests_from_message,
    scores_to_message,
    vector_to_message,
)
from inference_service.core.request import WORDLESS, AnswerDelta, AnswerFinished, AnswerStarted, Event
from loramux.inference.v1 import inference_pb2 as pb, inference_pb2_grpc
from loramux_shared.rpc.status import Context

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Translates messages and nothing else; faults become statuses in the server's interceptor."""

    def __init__(self, service: GenerationService) -> None:
        self._service = service

    def register(self, server: grpc.aio.Server) -> None:
        """Add the service to a server."""
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Stream the events of an answer.

        Nothing leaves before text does: a proxy may send a call elsewhere until its answer begins. The first
        tokens may be part of a character or of a stop text; after `WORDLESS` of them the answer begins anyway.
        """
        parsed = request_from_message(request, context, self._service.limits.max_seq_len)
        events = self._service.generate(parsed)
        held: list[pb.GenerateResponse] = []
        wordless, begun = 0, False
        text = self._service.text
        async with aclosing(events):
            async for event in events:
                text = event.text if isinstance(event, AnswerStarted) else text
                held += event_to_messages(event, text)
                wordless += len(event.tokens) if isinstance(event, AnswerDelta) else 0
                begun = begun or wordless > WORDLESS or isinstance(event, AnswerFinished) or _has_text(event)
                if begun:
                    for message in held:
                        yield message
                    held = []

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> AsyncIterator[pb.EmbedResponse]:
        """Stream vectors."""
        limits = self._service.limits
        dimensions = request.dimensions if request.HasField("dimensions") else None
        pooling = pooling_of(requested_pooling(request), self._service.usual_pooling, self._service.poolings)
        check_dimensions(dimensions, limits.hidden_size)
        parsed = requests_from_message(request, context, pooling, limits.max_seq_len)
        normalize, index = request.normalize or not request.HasField("normalize"), 0
        async with aclosing(pooled(self._service, parsed)) as found:
            async for each in found:
                vector = shaped(each.vector, dimensions, normalize=normalize)
                yield vector_to_message(index, each, vector)
                index += 1

    async def Classify(
        self, request: pb.ClassifyRequest, context: Context
    ) -> AsyncIterator[pb.ClassifyResponse]:
        """Stream scores."""
        parsed = requests_from_message(
            request, context, self._service.score_pooling, self._service.limits.max_seq_len
        )
        index = 0
        async with aclosing(scored(self._service, parsed)) as found:
            async for each in found:
                yield scores_to_message(index, each)
                index += 1

    async def ListModels(self, _request: pb.ListModelsRequest, _: Context) -> pb.ListModelsResponse:
        """List what is served."""
        models = [model_to_message(model, self._service) for model in self._service.local.catalog]
        return pb.ListModelsResponse(models=models)


def _has_text(event: Event) -> bool:
    return isinstance(event, AnswerDelta) and bool(event.text)
