"""gRPC services that extensions add to a replica: the entry points `loramux.services`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Protocol, Self

import grpc

from inference_service.adapters.manager import AdapterManager
from inference_service.serving.service import GenerationService
from loramux_shared.extensions import SERVICES, load_extensions
from loramux_shared.rpc.server import CORE, Rules

Services = Mapping[str, Callable[[grpc.aio.Server], None]]
"""Functions that add a service to a server, by the full name of the service."""


class ServiceExtension(Protocol):
    """The class that an entry point names: it is made once for a replica."""

    rules: Rules
    """Rules of its services."""

    def __init__(self, service: GenerationService, adapters: AdapterManager) -> None: ...

    def of_all_models(self, healthy: Callable[[], bool]) -> Services:
        """Return the services of the replica's own address."""
        ...

    def of_model(self, model: str, healthy: Callable[[], bool]) -> Services:
        """Return the services of an address that stands for one model, or none."""
        ...


@dataclass(frozen=True)
class Extensions:
    """The extensions of a replica, together."""

    made: tuple[ServiceExtension, ...]

    @classmethod
    def load(cls, service: GenerationService, adapters: AdapterManager) -> Self:
        """Make those that are installed."""
        return cls(tuple(each(service, adapters) for each in load_extensions(SERVICES).values()))

    @property
    def rules(self) -> Rules:
        """The rules of the core's services and of all of theirs."""
        return reduce(add, (each.rules for each in self.made), CORE)

    def of_all_models(self, healthy: Callable[[], bool]) -> Services:
        """Return the services of the replica's own address."""
        return {name: add for each in self.made for name, add in each.of_all_models(healthy).items()}

    def of_model(self, model: str, healthy: Callable[[], bool]) -> Services:
        """Return the services of an address that stands for one model."""
        return {name: add for each in self.made for name, add in each.of_model(model, healthy).items()}
