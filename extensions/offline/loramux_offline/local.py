"""A builder and a replica in this process, behind the methods of `loramux.AsyncClient`; nothing listens."""

import asyncio
import inspect
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, cast

from builder_service.builder import Builder
from builder_service.rpc.servicer import BuilderServicer
from inference_service.api.requests.service import GenerationService
from inference_service.api.rpc.adapters import AdapterServicer
from inference_service.api.rpc.servicer import InferenceServicer
from inference_service.core.request import AnswerDelta, AnswerFinished, Event, Request
from inference_service.driver.delivery import Sink
from inference_service.replica import Replica
from loramux import AsyncClient, Deployment
from loramux.cli import shell
from loramux.cli.build import follow_build
from loramux.cli.build_view import BuildView
from loramux.records import DeploymentInfo
from loramux_shared.deployment import SourceKind
from loramux_shared.process import hearing
from loramux_shared.settings import BuilderSettings, InferenceSettings, load_settings
from loramux_shared.wording import counted

HERE = "this process"


class LocalContext:
    """The context of a call that comes from this process: it may have a deadline, and has no metadata."""

    def __init__(self, timeout_s: float | None) -> None:
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s

    def time_remaining(self) -> float | None:
        """Return the seconds that are left, None where there is no deadline."""
        return None if self._deadline_s is None else self._deadline_s - time.monotonic()

    def invocation_metadata(self) -> tuple[()]:
        """Return no metadata."""
        return ()


class LocalStream:
    """The answer of a streaming method, with the interface of a call of gRPC."""

    def __init__(self, messages: AsyncGenerator[Any]) -> None:
        self._messages = messages

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._messages

    def cancel(self) -> None:
        """End the stream, and free what the replica holds for it."""
        self._closing = asyncio.ensure_future(self._messages.aclose())


class LocalCalls:
    """The methods of a servicer, called as those of a stub are; a fault is raised as it is."""

    def __init__(self, servicer: Any) -> None:
        self._servicer = servicer

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._servicer, name)

        def call(request: Any, *, timeout: float | None = None) -> Any:
            answer: Any = method(request, LocalContext(timeout))
            return LocalStream(cast("AsyncGenerator[Any]", answer)) if inspect.isasyncgen(answer) else answer

        return call


class WholeAnswers:
    """A service whose answers come in one piece: no task wakes, and no message is made, for each token."""

    def __init__(self, service: GenerationService) -> None:
        self._service = service

    def __getattr__(self, name: str) -> Any:
        return getattr(self._service, name)

    async def generate(self, request: Request) -> AsyncGenerator[Event]:
        """Answer a request as the service does, with all deltas of an answer as one before its end."""
        parts: defaultdict[int, list[AnswerDelta]] = defaultdict(list)

        def keep(delta: AnswerDelta) -> None:
            parts[delta.index].append(delta)

        async with aclosing(self._service.generate(request, Sink(lambda: True, keep))) as events:
            async for event in events:
                if isinstance(event, AnswerDelta):
                    keep(event)
                    continue
                if isinstance(event, AnswerFinished) and (deltas := parts.pop(event.index, [])):
                    tokens = tuple(token for delta in deltas for token in delta.tokens)
                    yield AnswerDelta("".join(delta.text for delta in deltas), tokens, event.index)
                yield event


class LocalClient(AsyncClient):
    """The client of a builder or a replica in this process."""

    def __init__(self, builder: Builder | None = None, replica: Replica | None = None) -> None:
        super().__init__(HERE, HERE, timeout_s=None, api_key=None)
        if builder is not None:
            self._builder = LocalCalls(BuilderServicer(builder.builds, builder.checks))
        if replica is not None:
            self._inference = LocalCalls(
                InferenceServicer(cast("GenerationService", WholeAnswers(replica.ready.service)))
            )
            self._adapters = LocalCalls(AdapterServicer(replica.operators.manager))


async def build(
    deployment: Deployment, settings: BuilderSettings, tell: Callable[[DeploymentInfo], None]
) -> None:
    """Fetch, check, convert and publish the adapters of a deployment; its states are told.

    Raises:
        Fault: what the build failed with.
    """
    builder = await Builder.open(settings)
    try:
        await follow_build(LocalClient(builder), deployment, tell, exact=True)
    finally:
        builder.checks.stop()
        await builder.builds.drain(0)


async def load(deployment: Deployment, store: str, *, progress: bool, **settings: Any) -> Replica:
    """Build a deployment and load it; folders that it names may be read. progress is shown as a command's is.

    Raises:
        Fault: what a builder refuses, or what loading raises.
    """
    roots = tuple(each.repo for each in deployment.repositories if each.source is SourceKind.LOCAL)
    common = {"store": store, "local_roots": roots}
    usual = {"follow_interval_s": 0, "prefill_first": True}
    replica_settings = load_settings(
        InferenceSettings, **common, deployment=deployment.model_name, **usual | settings
    )
    builder_settings = load_settings(BuilderSettings, **common)
    if not progress:
        await build(deployment, builder_settings, lambda _: None)
        return await Replica.load(replica_settings)
    shell.say(f"building {counted(len(deployment.build.lora_adapters), 'adapter')}")
    with BuildView() as view:
        await build(deployment, builder_settings, view.update)
    with shell.step("loading the base and its adapters") as came, hearing(came.tell):
        return await Replica.load(replica_settings)
