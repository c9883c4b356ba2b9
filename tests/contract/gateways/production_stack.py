"""The router and the adapter controller of vLLM's production-stack, written from its main of September 2026.

Sources: src/vllm_router/{service_discovery,utils}.py and stats/engine_stats.py for the router, and
operator/internal/controller/loraadapter_controller.go for the controller. Pods are replicas that are ready.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

STATS = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:gpu_prefix_cache_hits_total",
    "vllm:gpu_prefix_cache_queries_total",
    "vllm:gpu_cache_usage_perc",
}
"""What its statistics are made of; it also knows a hit rate that vLLM gave up."""
PAYLOADS: Mapping[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0.0,
        "max_tokens": 3,
    },
    "/v1/completions": {"prompt": "Hello", "max_tokens": 3},
}
"""What its health checks of static backends send."""


@dataclass(frozen=True)
class ModelInfo:
    """What the router keeps of a model."""

    id: str
    created: int
    owned_by: str
    root: str
    parent: str | None


@dataclass
class Router:
    """Asks replicas who they are and how they are."""

    web: httpx.AsyncClient
    api_key: str = ""
    """VLLM_API_KEY of its environment."""

    async def discover(self, url: str) -> dict[str, ModelInfo]:
        """Return the models of a replica; the first of them is its name to older routers."""
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        answer = await self.web.get(f"{url}/v1/models", headers=key, timeout=10)
        answer.raise_for_status()
        fields = ModelInfo.__dataclass_fields__
        listed = [{name: each[name] for name in fields} for each in answer.json()["data"]]
        return {each["id"]: ModelInfo(**each) for each in listed}

    async def stats(self, url: str) -> dict[str, float]:
        """Return what a scrape says, which goes without a key."""
        answer = await self.web.get(f"{url}/metrics", timeout=10)
        answer.raise_for_status()
        families = text_string_to_metric_families(answer.text)
        return {each.name: each.value for family in families for each in family.samples if each.name in STATS}

    async def is_healthy(self, url: str, model: str, path: str) -> bool:
        """Ask for three tokens."""
        body = {"model": model} | PAYLOADS[path]
        answer = await self.web.post(f"{url}{path}", json=body, timeout=10)
        return answer.status_code < 400 and bool(answer.json())


class LoraRefused(Exception):
    """What the controller writes into its log; it begins anew at once."""


@dataclass
class LoraController:
    """Loads adapters on replicas that do not list them."""

    web: httpx.AsyncClient

    async def registrations(self, url: str) -> dict[str, str]:
        """Return the adapters of a replica with their paths: the models that have a parent."""
        data = (await self._send("GET", f"{url}/v1/models")).json()["data"]
        return {each["id"]: each["root"] for each in data if each["parent"] is not None}

    async def load(self, url: str, name: str, path: str) -> None:
        """Load an adapter."""
        await self._send("POST", f"{url}/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    async def unload(self, url: str, name: str) -> None:
        """Let it go."""
        await self._send("POST", f"{url}/v1/unload_lora_adapter", {"lora_name": name})

    async def _send(self, method: str, url: str, body: dict[str, str] | None = None) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        answer = await self.web.request(method, url, json=body, headers=headers, timeout=30)
        if answer.status_code == 400:
            told = answer.json()
            if told["type"] == "InvalidUserInput" and "has already been loaded" in told["message"]:
                return answer
        if answer.status_code != 200:
            raise LoraRefused(f"unexpected status code: {answer.status_code}, body: {answer.text}")
        return answer
