"""The typed client, for asyncio and for threads.

::

    with Client() as client:
        print(client.complete("lora1", "def fib(n):", max_tokens=64).text)
        for event in client.generate("lora1", [{"role": "user", "content": "Hello"}]):
            if isinstance(event, Delta):
                print(event.text, end="", flush=True)
    Client("grpcs://models.example.com:50052", api_key="lmx_...")
    Client("dns:///replicas:50052")    # or ["10.0.0.4:50052", "10.0.0.5:50052"]: several replicas

Every failure is a class of `loramux.faults`. A stream that is left early (``break``, ``close``, a cancelled
task) is cancelled on the server, which frees its sequence.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Self, Unpack

import grpc

from loramux.builder.v1 import builder_pb2
from loramux.builder.v1.builder_pb2_grpc import BuilderServiceStub
from loramux.changes import Changes
from loramux.connection import Calls, CredentialOptions, Credentials, is_many, split
from loramux.fleet.fleet import Fleet
from loramux.fleet.members import Members
from loramux.inference.v1 import inference_pb2
from loramux.inference.v1.inference_pb2_grpc import InferenceServiceStub
from loramux.mapping import Watched, completion_of, deployment_of, event_of, model_of, report_of
from loramux.messages import check_request, deployment_to_message
from loramux.operations import AdapterMethods, adapter_stub
from loramux.records import AdapterReport, Completion, DeploymentInfo, Event, GenerateOptions, ModelInfo, Prompt
from loramux.requests import fitted, generate_request
from loramux.steps import (
    Ask,
    AsyncCaller,
    BlockingCaller,
    Service,
    Steps,
    Stream,
    async_iterated,
    awaited,
    blocking,
    iterated,
)
from loramux.vectors import VectorMethods
from loramux_shared.deployment import Deployment, LoraConfiguration, Repository
from loramux_shared.spelling import parse_repository

INFERENCE = "127.0.0.1:50052"
BUILDER = "127.0.0.1:50051"
CLOSE_S = 1.0
"""For a connection to close: milliseconds, unless it never does."""
CHECK_TIMEOUT_S = 600.0
"""A check fetches the adapter."""
DEFAULT_LORA = LoraConfiguration()

# The generated stubs have no types; what they answer is typed by the mapping.
_inference_stub: Callable[[Any], Any] = InferenceServiceStub
_builder_stub: Callable[[Any], Any] = BuilderServiceStub


class Services:
    """The connections of a client to both services."""

    timeout_s: float | None

    def models(self) -> Steps[list[ModelInfo]]:
        """Return the base, then the adapters by name."""
        answer = yield Ask("inference", "ListModels", inference_pb2.ListModelsRequest(), self.timeout_s)
        return [model_of(model) for model in answer.models]

    def generate(
        self, model: str, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Stream[Event]:
        """Stream one Started, any number of Delta, and one Finished per answer; timeout_s bounds all of it."""
        return Stream("inference", "Generate", generate_request(model, prompt, options), timeout_s, event_of)

    def complete(
        self, model: str, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Steps[Completion]:
        """Return the whole answer, or all n of them as ``choices``."""
        return completion_of((yield Services.generate(self, model, prompt, timeout_s=timeout_s, **options)))

    def build(
        self,
        deployment: Deployment,
        request_id: str | None = None,
        *,
        verify: bool = False,
        exact: bool = False,
    ) -> Steps[DeploymentInfo]:
        """Start a build; returns at once. Repeating it is safe.

        Adapters that were added or pushed stay, unless exact is true. With verify, every byte of kept bundles
        is read back.
        """
        spec = deployment_to_message(deployment)
        request = fitted(
            builder_pb2.BuildDeploymentRequest,
            deployment=spec,
            request_id=request_id or "",
            verify=verify,
            exact=exact,
        )
        return deployment_of((yield Ask("builder", "BuildDeployment", request, self.timeout_s)).deployment)

    def watch(
        self, name: str, *, follow: bool = False, request_id: str | None = None, timeout_s: float | None = None
    ) -> Stream[DeploymentInfo]:
        """Stream the state of a deployment: now, then every change, until ACTIVE or FAILED.

        With follow the stream has no end and has every generation, and adapters while builds run. With the
        request_id of a build or update, the states are those of that one, else those of the newest.
        """
        request = fitted(
            builder_pb2.WatchDeploymentRequest,
            name=name,
            changes_only=True,
            follow=follow,
            request_id=request_id or "",
        )
        return Stream("builder", "WatchDeployment", request, timeout_s, Watched().state_of)

    def cancel(self, name: str) -> Steps[DeploymentInfo]:
        """Cancel all builds of a deployment, running or waiting; returns at once. `watch` shows their end."""
        request = fitted(builder_pb2.CancelBuildRequest, name=name)
        return deployment_of((yield Ask("builder", "CancelBuild", request, self.timeout_s)).deployment)

    def deployment(self, name: str) -> Steps[DeploymentInfo]:
        """Return a deployment and its newest build."""
        request = fitted(builder_pb2.GetDeploymentRequest, name=name)
        return deployment_of((yield Ask("builder", "GetDeployment", request, self.timeout_s)).deployment)

    def deployments(self) -> Steps[list[DeploymentInfo]]:
        """Return all deployments, by name."""
        found: list[DeploymentInfo] = []
        request = builder_pb2.ListDeploymentsRequest()
        while True:
            answer = yield Ask("builder", "ListDeployments", request, self.timeout_s)
            found += map(deployment_of, answer.deployments)
            if not answer.next_page_token:
                return found
            request = builder_pb2.ListDeploymentsRequest(page_token=answer.next_page_token)

    def check(
        self,
        adapter: Repository | str,
        base: Repository | str,
        lora: LoraConfiguration = DEFAULT_LORA,
        *,
        signed_by: Sequence[str] = (),
        timeout_s: float | None = CHECK_TIMEOUT_S,
    ) -> Steps[AdapterReport]:
        """Check an adapter against a base as a build would; nothing is written.

        signed_by names the required signers: PEM, or ``sigstore:ISSUER#IDENTITY``; empty: none is required.
        Repositories may be text: ``"org/name@main"``, ``"./folder"``, ``"s3://bucket/prefix"``.
        """
        named = [parse_repository(each) if isinstance(each, str) else each for each in (adapter, base)]
        request = check_request(named[0], named[1], lora, signed_by)
        return report_of((yield Ask("builder", "CheckAdapter", request, timeout_s)).report)


class _Addresses:
    """The addresses of the services, and the credentials for them (see `loramux.connection`).

    timeout_s is the deadline of every call that is no stream. inference may be several replicas, see
    `loramux.connection`: a request goes to one of them, and to another where that does not answer.
    """

    _kind: Any
    """``grpc`` or ``grpc.aio``."""

    def __init__(
        self,
        inference: str | Sequence[str] = INFERENCE,
        builder: str = BUILDER,
        *,
        timeout_s: float | None = 30.0,
        **credentials: Unpack[CredentialOptions],
    ) -> None:
        self.inference = inference if isinstance(inference, str) else ",".join(inference)
        self.builder = builder
        self.timeout_s = timeout_s
        self._credentials = Credentials(**credentials)
        self._channels: list[Any] = []
        self._fleet: Fleet | None = None  # a client of one address needs no fleet
        if is_many(self.inference):
            self._fleet = Fleet(Members(split(self.inference)), self._credentials, self._kind)

    def _all_channels(self) -> list[Any]:
        return self._channels + (self._fleet.close() if self._fleet else [])

    # A channel belongs to the loop that runs when it is made, so it is made at the first call.
    @cached_property
    def _inference(self) -> Any:
        return self._on_replicas(_inference_stub)

    @cached_property
    def _adapters(self) -> Any:
        return self._on_replicas(adapter_stub)

    @cached_property
    def _builder(self) -> Any:
        return self._connect(_builder_stub, self.builder)

    def _target(self, service: Service) -> str:
        return self.builder if service == "builder" else self.inference

    def _calls(self, service: Service) -> Any:
        return getattr(self, f"_{service}")

    def _on_replicas(self, stub: Callable[[Any], Any]) -> Any:
        return self._fleet.calls(stub) if self._fleet else self._connect(stub, self.inference)

    def _connect(self, stub: Callable[[Any], Any], address: str, kind: Any = None) -> Any:
        channel = self._credentials.channel(address, kind or self._kind)
        self._channels.append(channel)
        return Calls(stub(channel), self._credentials)


class Client(BlockingCaller, _Addresses):
    """The client for threads; one may be shared by many."""

    _kind = grpc

    generate = iterated(Services.generate)
    watch = iterated(Services.watch)
    models = blocking(Services.models)
    complete = blocking(Services.complete)
    build = blocking(Services.build)
    cancel = blocking(Services.cancel)
    deployment = blocking(Services.deployment)
    deployments = blocking(Services.deployments)
    check = blocking(Services.check)
    embed = blocking(VectorMethods.embed)
    classify = blocking(VectorMethods.classify)
    update = blocking(Changes.update)
    push = blocking(Changes.push)
    rollback = blocking(Changes.rollback)
    history = blocking(Changes.history)
    watch_replica = iterated(AdapterMethods.watch_replica)
    adapters = blocking(AdapterMethods.adapters)
    adapter = blocking(AdapterMethods.adapter)
    pin = blocking(AdapterMethods.pin)
    unpin = blocking(AdapterMethods.unpin)
    load = blocking(AdapterMethods.load)
    unload = blocking(AdapterMethods.unload)
    rollback_replica = blocking(AdapterMethods.rollback_replica)
    replica = blocking(AdapterMethods.replica)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; open streams end with `CallFailed`."""
        for channel in self._all_channels():
            # gRPC waits for ever for a call that Ctrl-C interrupts in the moment of its begin.
            closing = threading.Thread(target=channel.close, daemon=True)
            closing.start()
            closing.join(CLOSE_S)


class AsyncClient(AsyncCaller, _Addresses):
    """The client for asyncio, with the methods of `Client`."""

    _kind = grpc.aio

    generate = async_iterated(Services.generate)
    watch = async_iterated(Services.watch)
    models = awaited(Services.models)
    complete = awaited(Services.complete)
    build = awaited(Services.build)
    cancel = awaited(Services.cancel)
    deployment = awaited(Services.deployment)
    deployments = awaited(Services.deployments)
    check = awaited(Services.check)
    embed = awaited(VectorMethods.embed)
    classify = awaited(VectorMethods.classify)
    update = awaited(Changes.update)
    push = awaited(Changes.push)
    rollback = awaited(Changes.rollback)
    history = awaited(Changes.history)
    watch_replica = async_iterated(AdapterMethods.watch_replica)
    adapters = awaited(AdapterMethods.adapters)
    adapter = awaited(AdapterMethods.adapter)
    pin = awaited(AdapterMethods.pin)
    unpin = awaited(AdapterMethods.unpin)
    load = awaited(AdapterMethods.load)
    unload = awaited(AdapterMethods.unload)
    rollback_replica = awaited(AdapterMethods.rollback_replica)
    replica = awaited(AdapterMethods.replica)

    @cached_property
    def _uploads(self) -> Any:
        # grpc.aio may lose the status of a server that ends a call while messages are sent: grpc/grpc#36066.
        return self._connect(_builder_stub, self.builder, grpc)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; open streams end with `CallFailed`."""
        for channel in self._all_channels():
            if (closing := channel.close()) is not None:
                await closing
