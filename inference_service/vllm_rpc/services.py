"""All of these services, as a gRPC server takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import grpc

from inference_service.adapters.manager import AdapterManager
from inference_service.serving.service import GenerationService
from inference_service.vllm_rpc import engine, inference
from inference_service.vllm_rpc.engine import VllmEngineServicer
from inference_service.vllm_rpc.inference import VllmInferenceServicer
from inference_service.vllm_rpc.running import Running
from inference_service.vllm_rpc.tokenizer import Archives

Services = Mapping[str, Callable[[grpc.aio.Server], None]]


class VllmServices:
    """Makes them for the doors of one replica, which know each other's requests."""

    def __init__(self, service: GenerationService, adapters: AdapterManager) -> None:
        self._service = service
        self._adapters = adapters
        self._running = Running()
        self._archives = Archives(service.base_files)

    def of_all_models(self, healthy: Callable[[], bool]) -> Services:
        """Return the services of the replica's own door."""
        inferring = VllmInferenceServicer(self._service, self._running)
        return {
            **self.of_model("", healthy),
            inference.SERVICE_NAME: partial(inference.register, inferring),
        }

    def of_model(self, model: str, healthy: Callable[[], bool]) -> Services:
        """Return the services of a door that stands for one model."""
        servicer = VllmEngineServicer(
            self._service, self._running, self._archives, healthy, dtype=self._adapters.facts.dtype, model=model
        )
        return {engine.SERVICE_NAME: partial(engine.register, servicer)}
