"""How a replica asks its builder for another generation, and waits for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from inference_service.rpc.publisher import ATTEMPTS, BuilderPublisher
from loramux.records import DeploymentInfo, DeploymentState
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import AdapterInvalid, BuildInProgress, Fault

REPOSITORY = Repository(source=SourceKind.HF, repo="org/lora")


def info(state: DeploymentState, generation: int | None, failure: Fault | None = None) -> DeploymentInfo:
    """A deployment."""
    return DeploymentInfo("demo", state, generation, None, None, (), failure, unchanged=False)


class Builder:
    """Is busy so often, then builds."""

    def __init__(self, end: DeploymentInfo, busy: int = 0) -> None:
        self.end = end
        self.busy = busy
        self.asked: list[Any] = []
        self.watched = 0

    async def update(
        self,
        name: str,
        add: Mapping[str, Repository | str] | None = None,
        remove: Iterable[str] = (),
        *,
        expected_generation: int | None = None,
        request_id: str | None = None,
    ) -> DeploymentInfo:
        """Begin, or say that others are first."""
        if self.busy:
            self.busy -= 1
            raise BuildInProgress("another build runs")
        self.asked.append((name, dict(add or {}), tuple(remove), expected_generation, request_id))
        return info(DeploymentState.BUILDING, None)

    async def watch(self, name: str) -> AsyncIterator[DeploymentInfo]:
        """Tell the begin and the end."""
        assert name == "demo"
        self.watched += 1
        yield info(DeploymentState.BUILDING, None)
        yield self.end

    async def rollback(self, name: str, to: int | None = None) -> Any:
        """Publish at once."""
        self.asked.append((name, to))
        return SimpleNamespace(generation=8)


async def test_an_update_returns_with_the_number_of_its_generation() -> None:
    """What is asked is what was meant; builds of others are waited for."""
    builder = Builder(info(DeploymentState.ACTIVE, 7), busy=2)
    publisher = BuilderPublisher(builder, "demo")
    assert await publisher.add("a", REPOSITORY, 6) == 7
    assert await publisher.remove("a") == 7
    assert await publisher.roll_back(3) == 8
    added, removed = ("demo", {"a": REPOSITORY}, (), 6, None), ("demo", {}, ("a",), None, None)
    assert builder.asked == [added, removed, ("demo", 3)]
    assert builder.watched == 4


async def test_what_a_build_fails_with_is_raised() -> None:
    """With the builder's reason."""
    builder = Builder(info(DeploymentState.FAILED, 6, AdapterInvalid("no LoRA")))
    with pytest.raises(AdapterInvalid):
        await BuilderPublisher(builder, "demo").add("a", REPOSITORY, None)


async def test_a_builder_that_is_always_busy_is_given_up() -> None:
    """By the name that the builder gave."""
    builder = Builder(info(DeploymentState.ACTIVE, 7), busy=99)
    with pytest.raises(BuildInProgress):
        await BuilderPublisher(builder, "demo").remove("a")
    assert builder.watched == ATTEMPTS - 1
