"""The calls of gateways' controllers and routers to replicas, written from their sources, without Kubernetes.

AIBrix, main of September 2026: pkg/controller/modeladapter/{modeladapter_controller,lora_client,utils}.go; its
back-offs are left out. vLLM's production-stack, main of September 2026: stats/engine_stats.py and
{service_discovery,utils}.py in src/vllm_router/, and operator/internal/controller/loraadapter_controller.go.
Pods are replicas with labels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

TRIES = 5
SCHEMES = ("s3://", "gcs://", "huggingface://", "hf://", "/")
LABELS = {"adapter.model.aibrix.ai/enabled": "true", "model.aibrix.ai/name": "base"}
STATS = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:gpu_prefix_cache_hits_total",
    "vllm:gpu_prefix_cache_queries_total",
    "vllm:gpu_cache_usage_perc",
}
"""Statistics of production-stack's router; it also knows a hit rate that vLLM gave up."""
PAYLOADS: Mapping[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0.0,
        "max_tokens": 3,
    },
    "/v1/completions": {"prompt": "Hello", "max_tokens": 3},
}
"""Bodies of that router's health checks of static backends."""


class LoadingFailed(Exception):
    """A failure that a controller writes into the adapter's status, or into its log."""


@dataclass
class Pod:
    """A replica as AIBrix knows it."""

    url: str
    labels: dict[str, str] = field(default_factory=lambda: dict(LABELS))


@dataclass
class ModelAdapter:
    """AIBrix's custom resource: which adapter, and where from."""

    name: str
    artifact_url: str
    key: str = ""
    instances: list[Pod] = field(default_factory=list)
    """Pods that are taken to have it."""


@dataclass
class AIBrix:
    """Loads an adapter on every pod that its labels select."""

    web: httpx.AsyncClient
    calls: list[str] = field(default_factory=list)

    async def reconcile(self, adapter: ModelAdapter, pods: list[Pod]) -> None:
        """Bring the adapter to the pods; each of them is looked at again, done or not."""
        assert adapter.artifact_url.startswith(SCHEMES)
        active = [pod for pod in pods if LABELS.items() <= pod.labels.items()]
        adapter.instances = [pod for pod in adapter.instances if pod in active]
        for pod in active:
            await self._try_to_load(adapter, pod)
            if pod not in adapter.instances:
                adapter.instances.append(pod)

    async def delete(self, adapter: ModelAdapter) -> None:
        """Unload the adapter everywhere; failures are only logged."""
        for pod in adapter.instances:
            await self._call("POST", pod, "/v1/unload_lora_adapter", adapter, {"lora_name": adapter.name})

    async def _try_to_load(self, adapter: ModelAdapter, pod: Pod) -> None:
        text = ""
        for _ in range(TRIES):
            listed = await self._call("GET", pod, "/v1/models", adapter)
            if listed.status_code != 200:
                text = listed.text
                continue
            if adapter.name in {each["id"] for each in listed.json()["data"]}:
                return
            path = adapter.artifact_url.removeprefix("huggingface://")
            body = {"lora_name": adapter.name, "lora_path": path}
            answer = await self._call("POST", pod, "/v1/load_lora_adapter", adapter, body)
            if answer.status_code in (200, 201):
                return
            text = answer.text
        raise LoadingFailed(f"max retries ({TRIES}) exceeded: {text}")

    async def _call(
        self, method: str, pod: Pod, path: str, adapter: ModelAdapter, body: dict[str, str] | None = None
    ) -> httpx.Response:
        headers = {"Authorization": f"Bearer {adapter.key}"} if adapter.key else {}
        self.calls.append(f"{method} {path}")
        return await self.web.request(method, f"{pod.url}{path}", headers=headers, json=body)


@dataclass
class Router:
    """Production-stack's router, which asks replicas what they serve and how they are."""

    web: httpx.AsyncClient

    async def discover(self, url: str) -> list[dict[str, Any]]:
        """Return the router's entry of each model; older routers read the first as a replica's name."""
        answer = await self.web.get(f"{url}/v1/models", headers={"Authorization": "Bearer any"})
        fields = ("id", "created", "owned_by", "root", "parent")
        return [{name: each[name] for name in fields} for each in answer.raise_for_status().json()["data"]]

    async def stats(self, url: str) -> dict[str, float]:
        """Return the values of a scrape, without a key."""
        answer = (await self.web.get(f"{url}/metrics")).raise_for_status()
        families = text_string_to_metric_families(answer.text)
        return {each.name: each.value for family in families for each in family.samples if each.name in STATS}

    async def is_healthy(self, url: str, model: str, path: str) -> bool:
        """Ask for three tokens."""
        answer = await self.web.post(f"{url}{path}", json={"model": model} | PAYLOADS[path])
        return answer.status_code < 400 and bool(answer.json())


@dataclass
class LoraController:
    """Production-stack's controller: it loads adapters on replicas that do not list them."""

    web: httpx.AsyncClient

    async def registrations(self, url: str) -> dict[str, str]:
        """Return the adapters of a replica with their paths: the models that have a parent."""
        data = (await self._send("GET", f"{url}/v1/models")).json()["data"]
        return {each["id"]: each["root"] for each in data if each["parent"] is not None}

    async def load(self, url: str, name: str, path: str) -> None:
        """Load an adapter."""
        await self._send("POST", f"{url}/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    async def unload(self, url: str, name: str) -> None:
        """Unload the adapter."""
        await self._send("POST", f"{url}/v1/unload_lora_adapter", {"lora_name": name})

    async def _send(self, method: str, url: str, body: dict[str, str] | None = None) -> httpx.Response:
        answer = await self.web.request(method, url, json=body)
        if answer.status_code == 400:
            parsed = answer.json()
            if parsed["type"] == "InvalidUserInput" and "has already been loaded" in parsed["message"]:
                return answer
        if answer.status_code != 200:
            raise LoadingFailed(f"unexpected status code: {answer.status_code}, body: {answer.text}")
        return answer
