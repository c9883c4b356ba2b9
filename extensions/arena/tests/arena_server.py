"""An inference service with versions that a test scripts, in their answers and refusals."""

# ruff: noqa: ARG002, N802 - the signatures and names of servicers are fixed

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from loramux.inference.v1 import inference_pb2 as pb, inference_pb2_grpc as inference_grpc
from loramux_shared.faults import Fault, ModelNotFound
from tests.support.servers import ANY_PORT, serve
from tests.support.services.fake_grpc import inference_server

Says = Callable[[str, str], str]
"""Returns what a version answers to the last turn, or the text."""


class Versions(inference_grpc.InferenceServiceServicer):
    """Serves ``base``, ``a`` and ``b``."""

    def __init__(self, says: Says, words: Mapping[str, float]) -> None:
        self.says = says
        self.words = words
        """Log probability of each letter of a prompt, by version."""
        self.heard: list[pb.GenerateRequest] = []
        self.refusals: Iterator[Fault | None] = iter(())
        """Faults with which the next requests end."""

    async def ListModels(self, request: Any, context: Any) -> Any:
        """List the versions."""
        models = [pb.Model(name=name, parent="" if name == "base" else "base") for name in self.words]
        return pb.ListModelsResponse(models=models)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Stream the scripted answer, or the likelihoods of the prompt's letters."""
        self.heard.append(request)
        if request.model not in self.words:
            raise ModelNotFound(f"no model {request.model!r}; served are {', '.join(self.words)}")
        if (refusal := next(self.refusals, None)) is not None:
            raise refusal
        turns = request.messages.messages
        query = turns[-1].content if turns else request.text
        yield pb.GenerateResponse(started=pb.Started(request_id="r", model=request.model, prompt_tokens=9))
        if request.sampling.HasField("prompt_logprobs"):
            yield pb.GenerateResponse(prompt_logprobs=self._scored(request.model, query))
        else:
            yield pb.GenerateResponse(delta=pb.Delta(text=self.says(request.model, query), token_ids=[1]))
        usage = pb.Usage(prompt_tokens=9, completion_tokens=1)
        yield pb.GenerateResponse(finished=pb.Finished(reason="FINISH_REASON_STOP", usage=usage))

    def _scored(self, model: str, text: str) -> pb.PromptLogprobs:
        letters = [*"<s>", *text]
        tokens = [pb.PromptToken(token=letter.encode(), logprob=self.words[model]) for letter in letters]
        tokens[0].ClearField("logprob")
        return pb.PromptLogprobs(tokens=tokens)


@asynccontextmanager
async def serving(service: Versions) -> AsyncIterator[str]:
    """Serve on a free port; yields the address."""
    async with serve(inference_server(ANY_PORT, service), 0.1) as server:
        yield server.address
