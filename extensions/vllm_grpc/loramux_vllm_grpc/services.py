"""All of these services, as a gRPC server takes them."""

from collections.abc import Callable
from typing import Final

from inference_service.adapters.manager import AdapterManager
from inference_service.rpc.extensions import Services
from inference_service.serving.service import GenerationService
from loramux_shared.access.keys import Scope
from loramux_shared.rpc.server import Rules
from loramux_vllm_grpc import engine, inference
from loramux_vllm_grpc.base_files import BaseFiles
from loramux_vllm_grpc.engine import VllmEngineServicer
from loramux_vllm_grpc.inference import VllmInferenceServicer
from loramux_vllm_grpc.running import Running
from loramux_vllm_grpc.tokenizer import Archives

ENGINE: Final = engine.SERVICE_NAME
RULES: Final = Rules(
    {
        inference.SERVICE_NAME: Scope.INFER,
        ENGINE: Scope.INFER,
        f"{ENGINE}/GetLoads": Scope.METRICS,
        f"{ENGINE}/FlushCache": Scope.ADMIN,
        f"{ENGINE}/StartProfile": Scope.ADMIN,
        f"{ENGINE}/StopProfile": Scope.ADMIN,
    },
    keyless=(f"/{ENGINE}/HealthCheck",),
    untraced=frozenset({f"/{ENGINE}/HealthCheck", f"/{ENGINE}/GetLoads"}),
)
"""Gateways ask for health and loads all the time, and show no key for health."""


class VllmServices:
    """Makes them for the addresses of one replica, which know each other's requests: `ServiceExtension`."""

    rules = RULES

    def __init__(self, service: GenerationService, adapters: AdapterManager) -> None:
        self._service = service
        self._adapters = adapters
        self._running = Running()
        self._archives = Archives(BaseFiles(service.placed))

    def of_all_models(self, healthy: Callable[[], bool]) -> Services:
        """Return the services of the replica's own port."""
        inferring = VllmInferenceServicer(self._service, self._running)
        return {
            **self.of_model("", healthy),
            inference.SERVICE_NAME: inferring.register,
        }

    def of_model(self, model: str, healthy: Callable[[], bool]) -> Services:
        """Return the services of a port that stands for one model."""
        servicer = VllmEngineServicer(
            self._service, self._running, self._archives, healthy, dtype=self._adapters.facts.dtype, model=model
        )
        return {ENGINE: servicer.register}
