"""The builder and the inference service, scripted: real gRPC servers on loopback without computation."""

# ruff: noqa: ARG002, N802 - the signatures and names of servicers are fixed

import argparse
import asyncio
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from loramux.builder.v1 import builder_pb2 as builder_pb, builder_pb2_grpc as builder_grpc
from loramux.inference.v1 import inference_pb2 as pb, inference_pb2_grpc as inference_grpc
from loramux.messages import deployment_from_message
from loramux_shared.access.guard import NOBODY_GUARDS, Guard
from loramux_shared.faults import DeploymentNotFound, ModelNotFound, RequestIdReused, RequestInvalid
from loramux_shared.rpc.server import RpcServer
from loramux_shared.rpc.stopping import Stop
from tests.support.servers import ANY_PORT, serve
from tests.support.waiting import in_thread

WORDS = ("the ", "grey ", "sea ", "sings")
STAGES = ("WAITING", "FETCHING", "VALIDATING", "CONVERTING", "PUBLISHING", "DONE")
NEVER_S = 86_400.0
PAUSES_S = {"wait": NEVER_S, "slow": 0.2}
DIGEST = "0123456789abcdef" * 4


def deployment_text(name: str, *adapters: str) -> str:
    lines = "".join(f"    {each}: {{source: HF, repo: org/{each}}}\n" for each in adapters)
    base = "checkpoint_repository: {source: HF, repo: org/base}"
    return f"model_name: {name}\nbuild:\n  {base}\n  lora_adapters:\n{lines}"


class FakeBuilder(builder_grpc.BuilderServiceServicer):
    """Builds nothing, stage by stage; an adapter named ``bad`` is refused with two findings."""

    def __init__(self) -> None:
        self.specs: dict[str, builder_pb.DeploymentSpec] = {}
        self.pages: list[str] = []

    async def BuildDeployment(self, request: Any, context: Any) -> Any:
        deployment_from_message(request.deployment)
        if request.request_id == "used":
            raise RequestIdReused("used before")
        self.specs[request.deployment.model_name] = request.deployment
        return builder_pb.BuildDeploymentResponse(deployment=self._at(request.deployment, 0))

    async def GetDeployment(self, request: Any, context: Any) -> Any:
        return builder_pb.GetDeploymentResponse(deployment=self._at(self._spec(request.name), 5))

    async def CancelBuild(self, request: Any, context: Any) -> Any:
        """Answer with a deployment that is done: there is nothing to cancel."""
        return builder_pb.CancelBuildResponse(deployment=self._at(self._spec(request.name), 5))

    async def ListDeployments(self, request: Any, context: Any) -> Any:
        self.pages.append(request.page_token)
        names = sorted(self.specs)
        index = int(request.page_token or 0)
        more = str(index + 1) if index + 1 < len(names) else ""
        found = [self._at(self.specs[name], 5) for name in names[index : index + 1]]
        return builder_pb.ListDeploymentsResponse(deployments=found, next_page_token=more)

    async def WatchDeployment(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Go through all stages; ``endless`` stays in the first."""
        spec = self._spec(request.name)
        for stage in range(len(STAGES)):
            yield builder_pb.WatchDeploymentResponse(deployment=self._at(spec, stage))
            await asyncio.sleep(NEVER_S if request.name == "endless" else 0.02)

    def _spec(self, name: str) -> builder_pb.DeploymentSpec:
        if name not in self.specs:
            raise DeploymentNotFound(f"no deployment {name!r}; there are: {', '.join(self.specs) or 'none'}")
        return self.specs[name]

    def _at(self, spec: builder_pb.DeploymentSpec, stage: int) -> builder_pb.Deployment:
        done = stage == 5
        failed = done and any(adapter.name == "bad" for adapter in spec.adapters)
        state = "STATE_FAILED" if failed else "STATE_ACTIVE" if done else "STATE_BUILDING"
        found = "REFUSED" if failed else STAGES[stage]
        answer = builder_pb.Deployment(
            name=spec.model_name,
            state=state,
            generation=3 if done else 0,
            adapters=[_adapter(adapter.name, found) for adapter in spec.adapters],
            failure=REFUSED if failed else None,
        )
        answer.create_time.FromSeconds(1_700_000_000)
        return answer


REFUSED = builder_pb.Failure(
    reason="ADAPTER_INVALID",
    message="1 adapter refused",
    findings=[
        builder_pb.Finding(code="E_RANK_MAX", adapter="bad", where="r", expected="<= 64", found="128"),
        builder_pb.Finding(code="E_SHAPE", adapter="bad", where="q_proj.lora_A", found="[8, 3]"),
    ],
)
BUILT: dict[str, Any] = {
    "digest": DIGEST, "ranks": [8, 16], "modules": ["attn_q", "attn_v", "mlp_gate"], "tensors_used": 120,
    "bundle_bytes": 5_200_000,
    "warnings": [builder_pb.Finding(code="W_NARROWED", where="weights", found="float32")],
}  # fmt: skip
"""Fields of an adapter whose build is done."""


def _adapter(name: str, stage: str) -> builder_pb.AdapterBuild:
    done = BUILT if stage == "DONE" else {}
    return builder_pb.AdapterBuild(
        name=name, stage=f"STAGE_{stage}", bytes_done=1_500, bytes_total=3_000, **done
    )


class FakeInference(inference_grpc.InferenceServiceServicer):
    """Serves ``base``, ``lora1`` and ``lora2``; the answer to ``wait`` never ends."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.cancelled = threading.Event()

    async def ListModels(self, request: Any, context: Any) -> Any:
        models = [pb.Model(name="base", generation=3, max_seq_len=2048)]
        for name, rank in (("lora1", 8), ("lora2", 16)):
            adapter = pb.Model(name=name, parent="base", digest=DIGEST, ranks=[rank], modules=["attn_q"])
            adapter.kinds.extend(["lora", "head"])
            adapter.replaced_rows["head"] = 5
            models.append(adapter)
        return pb.ListModelsResponse(models=models)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Say the same words to everyone, and the prompt's length."""
        self.requests.append(request)
        if request.model not in ("base", "lora1", "lora2"):
            raise ModelNotFound(f"no model {request.model!r}; served are base, lora1, lora2")
        if request.sampling.temperature > 2:
            raise RequestInvalid("temperature is out of bounds")
        turns = request.messages.messages
        text = turns[-1].content if turns else request.text
        try:
            yield pb.GenerateResponse(started=pb.Started(request_id="r1", model=request.model, prompt_tokens=7))
            for index, word in enumerate((*WORDS, f" ({len(turns)})")):
                yield pb.GenerateResponse(delta=pb.Delta(text=word, token_ids=[index]))
                await asyncio.sleep(PAUSES_S.get(text, 0.005))
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        usage = pb.Usage(prompt_tokens=7, cached_tokens=3, completion_tokens=5)
        yield pb.GenerateResponse(finished=pb.Finished(reason="FINISH_REASON_STOP", usage=usage))


def builder_server(address: str, servicer: FakeBuilder, guard: Guard = NOBODY_GUARDS) -> RpcServer:
    add: Any = builder_grpc.add_BuilderServiceServicer_to_server
    return RpcServer(address, {"loramux.builder.v1.BuilderService": partial(add, servicer)}, guard)


def inference_server(address: str, servicer: FakeInference, guard: Guard = NOBODY_GUARDS) -> RpcServer:
    add: Any = inference_grpc.add_InferenceServiceServicer_to_server
    return RpcServer(address, {"loramux.inference.v1.InferenceService": partial(add, servicer)}, guard)


@dataclass
class Fakes:
    """The builder and the inference service, and where they listen."""

    builder: FakeBuilder
    inference: FakeInference
    builder_address: str
    inference_address: str


@asynccontextmanager
async def _open_fakes(guard: Guard) -> AsyncIterator[Fakes]:
    builder, inference = FakeBuilder(), FakeInference()
    async with (
        serve(builder_server(ANY_PORT, builder, guard), 0.1) as one,
        serve(inference_server(ANY_PORT, inference, guard), 0.1) as other,
    ):
        yield Fakes(builder, inference, one.address, other.address)


def open_fakes(guard: Guard = NOBODY_GUARDS) -> AbstractContextManager[Fakes]:
    """Run both services in a thread of their own, for as long as the block takes."""
    return in_thread(_open_fakes(guard))


async def _main(kind: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--grpc", required=True)
    flags, rest = parser.parse_known_args()
    print(kind, *rest, file=sys.stderr)  # noqa: T201 - the log of a child
    if kind == "builder":
        server = builder_server(flags.grpc, FakeBuilder())
    else:
        server = inference_server(flags.grpc, FakeInference())
    await server.start()
    await server.set_serving("hang" not in rest)
    await Stop().wait()
    await server.drain(5)
    print("drained", file=sys.stderr)  # noqa: T201


def main(kind: str) -> None:
    """Run a service as a process, as ``python -m builder_service`` would."""
    asyncio.run(_main(kind))
