"""AIBrix's adapter controller, written from its main of September 2026.

Sources: pkg/controller/modeladapter/{modeladapter_controller,lora_client,utils}.go. Kubernetes is left out:
pods are replicas with labels, and a reconcile is called by the test instead of every 10 s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx

TRIES = 5
BACKOFF_S = 5 / 1000
"""Before the second try, and twice as much before each one after it; a thousandth of theirs."""
SCHEMES = ("s3://", "gcs://", "huggingface://", "hf://", "/")
LABELS = {"adapter.model.aibrix.ai/enabled": "true", "model.aibrix.ai/name": "base"}


class LoadingFailed(Exception):
    """What the controller writes into the adapter's status."""


@dataclass
class Pod:
    """A replica as the controller knows it."""

    url: str
    labels: dict[str, str] = field(default_factory=lambda: dict(LABELS))


@dataclass
class ModelAdapter:
    """The custom resource: which adapter, and where from."""

    name: str
    artifact_url: str
    config: Mapping[str, str] = field(default_factory=dict)
    instances: list[Pod] = field(default_factory=list)
    """Pods that are taken to have it."""


@dataclass
class Controller:
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
        """Unload it everywhere; what comes of it is logged and no more."""
        for pod in adapter.instances:
            await self._call("POST", pod, "/v1/unload_lora_adapter", adapter, {"lora_name": adapter.name})

    async def _try_to_load(self, adapter: ModelAdapter, pod: Pod) -> None:
        said = ""
        for tried in range(TRIES):
            await asyncio.sleep(BACKOFF_S * 2**tried if tried else 0)
            listed = await self._call("GET", pod, "/v1/models", adapter)
            if listed.status_code != 200:
                said = listed.text
                continue
            if adapter.name in {each["id"] for each in listed.json()["data"]}:
                return
            path = adapter.artifact_url.removeprefix("huggingface://")
            body = {"lora_name": adapter.name, "lora_path": path}
            answer = await self._call("POST", pod, "/v1/load_lora_adapter", adapter, body)
            if answer.status_code in (200, 201):
                return
            said = answer.text
        raise LoadingFailed(f"max retries ({TRIES}) exceeded: {said}")

    async def _call(
        self, method: str, pod: Pod, path: str, adapter: ModelAdapter, body: dict[str, str] | None = None
    ) -> httpx.Response:
        key = adapter.config.get("api-key")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.calls.append(f"{method} {path}")
        return await self.web.request(method, f"{pod.url}{path}", headers=headers, json=body, timeout=30)
