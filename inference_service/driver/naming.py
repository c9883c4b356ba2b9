"""The models that answer a request's name."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from inference_service.adapters.catalog import Catalog
from inference_service.adapters.follower import FollowerState
from inference_service.adapters.names import blend_parts, defaults_of
from inference_service.adapters.ports import GenerationFollower, Resolver
from inference_service.adapters.texts import AdapterTexts
from inference_service.core.request import ModelReference, Request, ResolvedModel
from inference_service.core.served_model import NO_DEFAULTS, AdapterDefaults, ServedModel
from loramux_shared.faults import (
    DeadlineExceeded,
    GenerationNotFound,
    ModelNotFound,
    ReplicaBehind,
    RequestInvalid,
)


class Naming:
    """Looks names up: after the generation that a request asks for, and once for all that is answered."""

    def __init__(
        self,
        catalog: Catalog,
        follower: GenerationFollower | None = None,
        texts: AdapterTexts | None = None,
        resolver: Resolver | None = None,
    ) -> None:
        """Look up in a catalog; follower takes newer generations over, texts are what adapters bring.

        resolver adds adapters that a request names by their repository.
        """
        self._resolver = resolver
        self._catalog = catalog
        self._follower = follower
        self._texts = texts

    async def choose(self, request: Request) -> ResolvedModel:
        """Return what answers a request.

        Raises:
            ReplicaBehind: there is no such generation here.
            GenerationNotFound: the replica serves the newest generation of the store, which is an older one.
            DeadlineExceeded: it did not arrive before the deadline.
            ModelNotFound: no such base or adapter.
            Fault: the adapter that it names by a repository is refused.
            RequestInvalid: the name is that of no single version, or lora_path that of another adapter.
        """
        reference = request.model
        if reference.served is not None:
            return reference.served
        if reference.min_generation > self._catalog.generation:
            await self._wait_for(reference.min_generation, request.scheduling.deadline_s)
        try:
            model = self._model(reference)
        except ModelNotFound:
            if self._resolver is None:
                raise
            await self._bring(self._resolver, reference, request.scheduling.deadline_s)
            model = self._model(reference)
        return ResolvedModel(model, self._catalog.generation)

    def _model(self, reference: ModelReference) -> ServedModel:
        model = (
            self._mix(reference)
            if reference.adapters
            else self._catalog.resolve(reference.name, reference.sticky_key)
        )
        path = reference.lora_path
        return model if path is None else self._beside(model, path, reference)

    async def _bring(self, resolver: Resolver, reference: ModelReference, deadline_s: float | None) -> None:
        """Add the adapters that a request names, as far as its deployment allows that."""
        parts = [part.name for part in reference.adapters or blend_parts(reference.name)]
        names = [*(parts or [reference.name]), reference.lora_path or ""]
        async with _until(
            deadline_s, "the adapter was not added before the deadline. It is being built: retry."
        ):
            await asyncio.gather(*map(resolver.bring, names))

    def _mix(self, reference: ModelReference) -> ServedModel:
        """Return the blend of the adapters that a request names; its model may name the base beside them."""
        if reference.name and self._catalog.resolve(reference.name).name != self._catalog.base_name:
            raise RequestInvalid.of_field(
                "the request names adapters twice.",
                "adapters",
                "none together with a model other than the base",
                repr(reference.name[:80]),
                "Name all of them in adapters, or all in model, as in a*0.7+b*0.5.",
            )
        return self._catalog.mix(reference.adapters, reference.sticky_key, "adapters")

    def _beside(self, model: ServedModel, path: str, reference: ModelReference) -> ServedModel:
        """Return what model and lora_path name together: one adapter twice, or the base and an adapter."""
        if path in (reference.name, model.name):
            return model
        found = self._catalog.resolve(path, reference.sticky_key)
        if model.name != self._catalog.base_name and (found.name, found.digest) != (model.name, model.digest):
            raise RequestInvalid.of_field(
                "the request names two models.",
                "lora_path",
                f"the adapter that model names, {model.name}",
                repr(path[:80]),
                "Set model to the adapter, and leave lora_path out.",
            )
        return found

    async def defaults(self, model: ServedModel) -> AdapterDefaults:
        """Return what an adapter brings beside its weights, or raise why it cannot be read."""
        return await defaults_of(model, self._read_defaults)

    async def _read_defaults(self, model: ServedModel) -> AdapterDefaults:
        if self._texts is None:
            return NO_DEFAULTS
        defaults = await self._texts.defaults(model.digest, model.name)
        self._catalog.know(model.digest, defaults=defaults)
        return defaults

    async def _wait_for(self, number: int, deadline_s: float | None) -> None:
        if self._follower is None:
            raise self._behind(number)
        async with _until(deadline_s, f"generation {number} did not arrive before the deadline."):
            try:
                await self._follower.catch_up(number)
            except ReplicaBehind:
                standing = self._follower.standing
                if standing.state is not FollowerState.CURRENT:
                    raise
                raise GenerationNotFound(
                    f"the request asks for generation {number}, and the newest that was published is "
                    f"{standing.generation}. Ask for a published one."
                ) from None
        if number > self._catalog.generation:
            raise self._behind(number)

    def _behind(self, number: int) -> ReplicaBehind:
        return ReplicaBehind(
            f"the request asks for generation {number}, and this replica has {self._catalog.generation}. "
            "Retry in a moment, or check which generation the deployment's builder published."
        )


@asynccontextmanager
async def _until(deadline_s: float | None, late: str) -> AsyncGenerator[None]:
    """Wait within the block until a deadline on the monotonic clock at most; late is what is missing then."""
    left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
    try:
        async with asyncio.timeout(left_s) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceeded(late) from None
