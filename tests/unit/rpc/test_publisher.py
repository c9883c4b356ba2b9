"""A replica's requests to its builder for another generation, and its wait for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from inference_service.rpc.builder import BuilderPublisher
from loramux.records import DeploymentInfo, DeploymentState
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import AdapterInvalid, Fault

REPOSITORY = Repository(source=SourceKind.HF, repo="org/lora")


def info(state: DeploymentState, generation: int | None, failure: Fault | None = None) -> DeploymentInfo:
    """A deployment."""
    return DeploymentInfo("demo", state, generation, None, None, (), failure, unchanged=False)


class Builder:
    """Builds, and has watchers ask for the build of their request."""

    def __init__(self, end: DeploymentInfo) -> None:
        self.end = end
        self.asked: list[Any] = []
        self.request_ids: list[str | None] = []

    async def update(
        self,
        name: str,
        add: Mapping[str, Repository | str] | None = None,
        remove: Iterable[str] = (),
        *,
        must_be_new: bool = False,
        request_id: str | None = None,
    ) -> DeploymentInfo:
        """Begin."""
        self.asked.append((name, dict(add or {}), tuple(remove), must_be_new))
        self.request_ids.append(request_id)
        return info(DeploymentState.BUILDING, None)

    async def watch(self, name: str, *, request_id: str | None = None) -> AsyncIterator[DeploymentInfo]:
        """Tell the begin and the end."""
        assert name == "demo"
        assert request_id == self.request_ids[-1]
        yield info(DeploymentState.BUILDING, None)
        yield self.end

    async def rollback(self, name: str, to: int | None = None) -> Any:
        """Publish at once."""
        self.asked.append((name, to))
        return SimpleNamespace(generation=8)


async def test_an_update_returns_with_the_number_of_its_generation() -> None:
    """The request has the caller's fields, and an id of its own."""
    builder = Builder(info(DeploymentState.ACTIVE, 7))
    publisher = BuilderPublisher(builder, "demo")
    assert await publisher.add("a", REPOSITORY, must_be_new=True) == 7
    assert await publisher.remove("a") == 7
    assert await publisher.roll_back(3) == 8
    added, removed = ("demo", {"a": REPOSITORY}, (), True), ("demo", {}, ("a",), False)
    assert builder.asked == [added, removed, ("demo", 3)]
    assert len(set(builder.request_ids)) == 2


async def test_what_a_build_fails_with_is_raised() -> None:
    """A failed build raises with the builder's reason."""
    builder = Builder(info(DeploymentState.FAILED, 6, AdapterInvalid("no LoRA")))
    with pytest.raises(AdapterInvalid):
        await BuilderPublisher(builder, "demo").add("a", REPOSITORY, must_be_new=False)
