"""An inference service with models that a test scripts, in their answers and refusals."""

# ruff: noqa: ARG002, N802 - the signatures and names of servicers are fixed

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from loramux.inference.v1 import inference_pb2 as pb, inference_pb2_grpc as inference_grpc
from loramux_shared.faults import Fault, ModelNotFound
from tests.support.fake_services import inference_server
from tests.support.waiting import until

DIGESTS = {"base": "", "a": "a" * 64, "b": "b" * 64, "a*0.5+b*0.5": "c" * 64}
Says = Callable[[str, str, int], str]
"""Model, the last turn or the text, and the seed to what it says."""


class Versions(inference_grpc.InferenceServiceServicer):
    """Serves ``base``, ``a``, ``b`` and a mixture; the judge of it all is the model of a test."""

    def __init__(self, says: Says) -> None:
        self.says = says
        self.heard: list[pb.GenerateRequest] = []
        self.refusals: Iterator[Fault | None] = iter(())
        """Faults with which the next requests end."""
        self.digests: dict[str, str] = dict(DIGESTS)
        self.silent: frozenset[str] = frozenset()
        """Those that were trained for scores."""
        self.open = self.most_open = 0
        self.together = 1
        """So many must be open at once before the first of them ends."""
        self.words: Mapping[str, float] = {}
        """Log probability of a word of a prompt, by model."""
        self.holds: asyncio.Event | None = None
        """Set: requests wait for it after their first token."""

    async def ListModels(self, request: Any, context: Any) -> Any:
        """Answer with all but the mixture."""
        names = [name for name in self.digests if "+" not in name]
        models = [pb.Model(name=name, parent="" if name == "base" else "base") for name in names]
        for model in models:
            model.digest = self.digests[model.name]
            model.kinds.extend(["classifier"] * (model.name in self.silent))
        return pb.ListModelsResponse(models=models)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Stream the scripted answer in two messages."""
        self.heard.append(request)
        if request.model not in self.digests:
            raise ModelNotFound(f"no model {request.model!r}; served are base, a, b")
        if (refusal := next(self.refusals, None)) is not None:
            raise refusal
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            async for event in self._events(request):
                yield event
        finally:
            self.open -= 1

    async def _events(self, request: Any) -> AsyncIterator[Any]:
        turns = request.messages.messages
        requests = turns[-1].content if turns else request.text
        stated = self.says(request.model, requests, request.sampling.seed)
        digest = self.digests[request.model]
        started = pb.Started(request_id="r", model=request.model, adapter_digest=digest, prompt_tokens=9)
        yield pb.GenerateResponse(started=started)
        if request.sampling.HasField("prompt_logprobs"):
            yield pb.GenerateResponse(prompt_logprobs=self._scored(request.model, requests))
            stated = ""
        await until(lambda: self.most_open >= self.together, "others that are open too", lambda: self.most_open)
        for piece in (stated[:1], stated[1:]):
            if piece:
                yield pb.GenerateResponse(delta=pb.Delta(text=piece, token_ids=[1]))
        if self.holds is not None:
            await self.holds.wait()
        usage = pb.Usage(prompt_tokens=9, cached_tokens=4, completion_tokens=2)
        yield pb.GenerateResponse(finished=pb.Finished(reason="FINISH_REASON_STOP", usage=usage))

    def _scored(self, model: str, text: str) -> pb.PromptLogprobs:
        """Return a prompt whose tokens are letters, each as likely as the model of a test has it."""
        letters = [*"<s>", *text]
        tokens = [pb.PromptToken(token=letter.encode(), logprob=self.words[model]) for letter in letters]
        tokens[0].ClearField("logprob")
        return pb.PromptLogprobs(tokens=tokens)


@asynccontextmanager
async def serving(service: Versions) -> AsyncIterator[str]:
    server = inference_server("127.0.0.1:0", service)
    address = await server.start()
    await server.set_serving(True)
    try:
        yield address
    finally:
        await server.drain(0.1)
