"""Adapters that requests add by naming a repository: without an engine, and with a builder and a hub."""

import asyncio
from collections import Counter
from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from inference_service.core.request import ModelReference, Request, RequestPrompt
from inference_service.driver.naming import Naming
from loramux_resolve.resolver import BUILDS, MOST_BUILDS, REMEMBERED_S, Resolver, allowed
from loramux_shared import faults
from loramux_shared.access.keys import ACCESS, Access, Scope
from loramux_shared.bundle.deployments import require_deployment
from loramux_shared.bundle.generation import resolved_key
from loramux_shared.deployment import Resolve
from loramux_shared.storage.memory import MemoryStore
from tests.support.cases import cases
from tests.support.hub import HubRepo, serve_hub
from tests.support.openai_api import OpenAIApi, openai_world
from tests.support.services.managed_replica import ManagedReplica, managed_replica
from tests.support.services.operated_replicas import open_builder, open_fleet
from tests.support.waiting import result_of, until

LABEL = "hub_key"
SOURCES = ("hf:lab/*", "s3://models/adapters/*", "https://files.example/*.tar.gz", "mlflow://support/*")


class Replica:
    """A replica that adds what requests name, and its clock."""

    def __init__(self, store: MemoryStore, other: ManagedReplica | None = None, **rule: object) -> None:
        self.operated = other or managed_replica()
        self.store = store
        self.time_s = 0.0
        deployment = self.operated.deployment
        changed = deployment.newest.model_copy(update={"resolve": Resolve(sources=SOURCES, **rule)})
        deployment.history.append(changed)
        self.operated.names.apply(changed)
        self.now = datetime.now(UTC)
        self.resolver = Resolver(
            self.operated.manager, self.operated.names, store, clock=lambda: self.time_s, now=lambda: self.now
        )

    @property
    def names(self) -> set[str]:
        return {model.name for model in self.operated.names.everything}

    @property
    def marks(self) -> set[str]:
        prefix = resolved_key("demo")
        return {key.removeprefix(prefix) for key in self.store.list(prefix)}

    def wait(self, **time: float) -> None:
        self.now += timedelta(**time)


@pytest.fixture
def replica() -> Replica:
    return Replica(MemoryStore())


@pytest.mark.parametrize(
    ("requested", "branches_only"),
    [
        ("lab/a", True),
        ("lab/a@main", True),
        ("lab/a@refs/pr/1", True),
        ("lab/a@" + "9" * 40, True),
        ("open/a", True),
        ("open/a@refs/pr/1", False),
        ("open/a@refs/pr/1/2", True),
        ("open/a@pr/1", True),
        ("open/a@refs%2Fpr%2F1", True),
        ("tagged/a@v1", True),
        ("tagged/a@main", None),
        ("tagged/a@refs/pr/1", None),
        ("tagged/a", None),
        ("s3://models/adapters/a", False),
    ],
)
def test_pull_requests_are_allowed_by_name_alone(requested: str, branches_only: bool | None) -> None:
    """The builder looks whether a revision is of a branch or tag, unless a pattern names pull requests."""
    more = ("hf:open/*@refs/pr/*", "hf://open/*", "hf:tagged/*@v*")
    found = allowed(Resolve(sources=(*SOURCES, *more)), requested)
    assert (None if found is None else found.branches_only) == branches_only


@pytest.mark.parametrize(
    ("requested", "address"), cases(__file__, "test_only_repositories_that_a_pattern_allows_are_added")
)
def test_only_repositories_that_a_pattern_allows_are_added(requested: str, address: str) -> None:
    """A star is one part of a path; folders of a machine, subfolders and queries never match."""
    found = allowed(Resolve(sources=SOURCES, runtime_secret_name=LABEL), requested)
    assert (f"{found.repo}@{found.revision}" if found else "") == address
    assert found is None or found.runtime_secret_name == LABEL


async def test_a_request_adds_the_adapter_that_it_names(replica: Replica) -> None:
    """The lookup of a request waits for the adapter, and finds it again under the path."""
    naming = Naming(replica.operated.names, resolver=replica.resolver)

    async def served(name: str, lora_path: str | None = None) -> str:
        model = ModelReference(name, lora_path=lora_path)
        return (await naming.choose(Request(model, RequestPrompt("")))).model.name

    assert await served("lab/support@v2") == "lab:support:v2"
    assert await served("lab/support@v2") == await served("lab:support:v2") == "lab:support:v2"
    assert await served("hf://lab/support@v2") == await served("hf:lab/support@v2") == "lab:support:v2"
    assert await served("base", "lab/other") == "lab:other"
    assert "lab:left" in await served("lab/left*0.5+lab/right*0.5")
    assert len(replica.operated.deployment.asked) == 4
    assert replica.marks == {"lab:support:v2", "lab:other", "lab:left", "lab:right"}
    with pytest.raises(faults.ModelNotFound):
        await served("elsewhere/support")


async def test_many_requests_cause_one_build(replica: Replica) -> None:
    """The adapter that another replica adds meanwhile is not built again."""
    await asyncio.gather(*(replica.resolver.bring("lab/support") for _ in range(20)))
    assert len(replica.operated.deployment.asked) == 1
    replica.operated.deployment.racing.append({"lab:other": 7})
    await replica.resolver.bring("lab/other")
    assert "lab:other" in replica.names


async def raised(call: Awaitable[None]) -> str:
    """The reason of a call's fault; empty where it has none."""
    try:
        await call
    except faults.Fault as fault:
        return fault.reason
    return ""


async def test_a_refusal_is_remembered_for_a_minute(replica: Replica) -> None:
    """A passing failure is not remembered."""
    deployment, bring = replica.operated.deployment, replica.resolver.bring
    deployment.refuses = faults.StoreUnavailable("down")
    assert [await raised(bring("lab/a")) for _ in range(2)] == [faults.StoreUnavailable.reason] * 2
    assert len(deployment.asked) == 2
    deployment.refuses = faults.AdapterInvalid("no LoRA")
    assert [await raised(bring("lab/a")) for _ in range(3)] == [faults.AdapterInvalid.reason] * 3
    assert len(deployment.asked) == 3
    deployment.refuses, replica.time_s = None, REMEMBERED_S + 1
    await bring("lab/a")
    assert "lab:a" in replica.names


async def test_a_key_needs_the_scope_and_sees_its_models_alone(replica: Replica) -> None:
    """A key that is limited to other models finds no such model."""
    bring = replica.resolver.bring
    for access, reason in (
        (Access("a", frozenset({Scope.INFER})), faults.PermissionDenied.reason),
        (Access("b", frozenset({Scope.RESOLVE}), frozenset({"one"})), ""),
        (Access("c", frozenset({Scope.RESOLVE}), frozenset({"lab:a"})), ""),
    ):
        ACCESS.set(access)
        assert await raised(bring("lab/a")) == reason
        assert ("lab:a" in replica.names) == (access.key_id == "c")


async def test_names_and_builds_are_bounded(replica: Replica) -> None:
    """A name that is too long is refused before a build, and one build too many until another ends."""
    assert await raised(replica.resolver.bring("lab/" + "a" * 200)) == faults.RequestInvalid.reason
    calls = [replica.resolver.bring(f"lab/{number}") for number in range(MOST_BUILDS + 1)]
    reasons = await asyncio.gather(*map(raised, calls))
    assert reasons == [""] * MOST_BUILDS + [faults.QueueFull.reason]


def bring_of(key_id: str, replica: Replica, name: str) -> asyncio.Task[str]:
    """Begin to bring an adapter for a key; the task returns why it was refused."""
    ACCESS.set(Access(key_id, frozenset({Scope.RESOLVE})))
    return asyncio.create_task(raised(replica.resolver.bring(f"lab/{name}")))


async def test_one_key_does_not_hold_all_builds(replica: Replica) -> None:
    """A key that is alone has all but one at once, and of those that wait; the next key's is built beside."""
    builds = replica.operated.deployment.asked
    replica.operated.deployment.building.clear()
    calls = [bring_of("a", replica, f"a{number}") for number in range(MOST_BUILDS)]
    await until(lambda: len(builds) == BUILDS - 1, "builds at once", lambda: len(builds))
    other = bring_of("b", replica, "b")
    await until(lambda: builds[-1][0] == "lab:b", "the other key's build")
    assert len(replica.marks) == BUILDS
    replica.operated.deployment.building.set()
    reasons = await result_of(asyncio.gather(other, *calls), "all builds")
    assert reasons == [""] * MOST_BUILDS + [faults.QueueFull.reason]


async def test_of_two_busy_keys_each_has_half_of_the_builds(replica: Replica) -> None:
    """The last place is left to a key that has none, and what waits is built later."""
    builds = replica.operated.deployment.asked
    replica.operated.deployment.building.clear()
    calls = [bring_of(key_id, replica, f"{key_id}{number}") for number in range(BUILDS) for key_id in "ab"]
    await until(lambda: len(builds) == BUILDS - 1, "builds at once", lambda: len(builds))
    calls.append(bring_of("c", replica, "c"))
    await until(lambda: len(builds) == BUILDS, "the last place", lambda: len(builds))
    begun = Counter(name.removeprefix("lab:")[0] for name, *_ in builds)
    assert begun == {"a": BUILDS // 2, "b": BUILDS // 2 - 1, "c": 1}
    replica.operated.deployment.building.set()
    assert set(await result_of(asyncio.gather(*calls), "all builds")) == {""}


async def test_idle_adapters_leave_and_used_ones_stay(replica: Replica) -> None:
    """The use by another replica counts too, as the date of the mark."""
    for name in ("idle", "running", "elsewhere"):
        await replica.resolver.bring(f"lab/{name}")
    residency = replica.operated.residency
    residency.hold(replica.operated.adapter("lab:running"), in_flight=1)
    replica.wait(hours=71)
    await replica.resolver.look()
    replica.store.modified[resolved_key("demo", "lab:elsewhere")] = replica.now
    replica.wait(hours=2)
    await replica.resolver.look()
    assert replica.names == {"base", "one", "two", "lab:running", "lab:elsewhere"}
    assert replica.marks == {"lab:running", "lab:elsewhere"}


async def test_beyond_the_number_the_oldest_leave() -> None:
    """Adapters of the file are not counted, and never leave; uses of a replica alone do not count."""
    replica = Replica(MemoryStore(), max_adapters=2)
    for name in "abcd":
        await replica.resolver.bring(f"lab/{name}")
        replica.store.modified[resolved_key("demo", f"lab:{name}")] = replica.now
        replica.wait(seconds=1)
    replica.operated.residency.hold(replica.operated.adapter("lab:a"), in_flight=1)
    await replica.resolver.look()
    assert replica.names == {"base", "one", "two", "lab:c", "lab:d"}
    replica.store.delete(resolved_key("demo", "lab:c"))  # by a replica that had removed the adapter before
    await replica.resolver.look()
    assert replica.marks == {"lab:c", "lab:d"}


async def test_the_key_that_added_most_loses_its_own() -> None:
    """Adapters of other keys stay, on a replica too that knows the keys from the marks alone."""
    store = MemoryStore()
    replica = Replica(store, max_adapters=4)
    for key_id, names in (("b", "12"), ("a", "34567")):
        ACCESS.set(Access(key_id, frozenset({Scope.RESOLVE})))
        for name in names:
            await replica.resolver.bring(f"lab/{name}")
            store.modified[resolved_key("demo", f"lab:{name}")] = replica.now
            replica.wait(seconds=1)
    other = Resolver(replica.operated.manager, replica.operated.names, store, now=lambda: replica.now)
    await other.look()
    assert replica.marks == {"lab:1", "lab:2", "lab:6", "lab:7"}


async def test_marks_without_an_adapter_go(replica: Replica) -> None:
    """A refused build leaves none; one that may still end well, or a removal by an operator, leaves one."""
    replica.operated.deployment.refuses = faults.AdapterInvalid("no LoRA")
    await raised(replica.resolver.bring("lab/junk"))
    assert not replica.marks
    replica.operated.deployment.refuses = faults.StoreUnavailable("down")
    await raised(replica.resolver.bring("lab/a"))
    await replica.resolver.look()
    assert replica.marks == {"lab:a"}
    replica.wait(hours=2)
    await replica.resolver.look()
    assert not replica.marks


async def ask(api: OpenAIApi, model: str, *, stream: bool = False) -> tuple[int, str]:
    """Return status and text of a short answer."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 4,
        "temperature": 0,
    }
    answer = await api.post("/v1/chat/completions", **body, stream=stream)
    return answer.status_code, answer.text if stream or answer.is_error else answer.json()["choices"][0][
        "message"
    ]["content"]


async def test_two_replicas_add_each_adapter_once(tmp_path: Path) -> None:
    """Requests of both at the same moment wait for one download, and answer as the registered twin does."""
    world = openai_world(tmp_path / "world", built=False)
    twin = next(iter(world[0].adapters))
    world[0].build_with(world[1], runtime={"resolve": {"sources": ["hf:lab/*"]}})
    files = {path.name: path.read_bytes() for path in world[0].adapters[twin].iterdir()}
    with serve_hub() as hub:
        hub.repos["lab/twin"] = HubRepo({"main": "c" * 40, "v1": "d" * 40}, files)
        hub.repos["lab/twin"].revisions["refs/pr/1"] = "f" * 40
        hub.repos["lab/broken"] = HubRepo({"main": "e" * 40}, {"README.md": b"nothing"})
        async with (
            open_builder(world, tmp_path / "work", hub_endpoint=hub.endpoint) as builder,
            open_fleet(world, 2, builder=builder) as replicas,
        ):
            expected = await ask(replicas[0], twin)
            calls = [ask(api, "lab/twin") for api in replicas for _ in range(4)]
            assert await asyncio.gather(*calls) == [expected] * 8
            assert hub.downloaded().count("adapter_model.safetensors") == 1
            assert (await ask(replicas[1], "lab/twin@v1")) == expected
            for revision in ("refs/pr/1", "f" * 40):
                status, body = await ask(replicas[0], f"lab/twin@{revision}")
                assert (status, "any user may open" in body) == (403, True), body
            status, body = await ask(replicas[0], "lab/broken")
            assert (status, "adapter_config.json" in body) == (400, True), body
            assert (await ask(replicas[0], "lab/absent"))[0] == 404
            assert (await ask(replicas[0], "other/twin"))[0] == 404
            assert (await ask(replicas[0], "lab/twin", stream=True))[0] == 200
    names = set(require_deployment(world[1], "tiny").adapters)
    assert names == {*world[0].adapters, "lab:twin", "lab:twin:v1"}
