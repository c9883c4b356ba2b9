"""Operators' calls for adapters, and pins that names keep while versions come and go."""

import pytest

from inference_service.adapters.catalog import Catalog
from inference_service.adapters.changing import digest_of as digest_in, repository_of
from inference_service.adapters.fixed import fixed_manager
from inference_service.core.served_model import ServedModel
from loramux_shared import faults
from loramux_shared.access.keys import ACCESS, Access, Scope
from tests.support.cases import cases
from tests.support.services.managed_replica import digest_of, generation, managed_replica


def test_pages_give_every_name_once_and_look_at_no_other() -> None:
    """A page of ten looks at ten of 2,500 names; all pages together are all names in their order."""
    names = [f"lora-{number:05}" for number in range(2_500)]
    replica = managed_replica(names)
    page = replica.manager.list(limit=10)
    assert [each.name for each in page.adapters] == names[:10]
    assert replica.residency.looked_at == 10
    found, after = [], ""
    while True:
        page = replica.manager.list(after, 1000)
        found += [each.name for each in page.adapters]
        after = page.next_page
        if not after:
            break
    assert found == names
    with pytest.raises(faults.PageTokenInvalid):
        replica.manager.list("x" * 300)


def test_a_key_of_some_models_sees_those() -> None:
    """A limit to models holds for an admin key too, and its pages are full."""
    replica = managed_replica(["a", "b", "c", "d"])
    token = ACCESS.set(Access("k", frozenset({Scope.ADMIN}), frozenset({"b", "d"})))
    try:
        page = replica.manager.list(limit=2)
        assert ([each.name for each in page.adapters], page.next_page) == (["b", "d"], "")
        with pytest.raises(faults.ModelNotFound):
            replica.manager.pin("a")
    finally:
        ACCESS.reset(token)


def test_the_base_is_no_adapter() -> None:
    """A pin of the base is refused by name."""
    with pytest.raises(faults.RequestInvalid, match="'base' is the base; expected the name of an adapter"):
        managed_replica().manager.pin("base")


def test_a_pin_follows_its_name() -> None:
    """The new version is pinned before the old one is let go; unpinning lets the present one go."""
    replica = managed_replica()
    replica.manager.pin("one")
    replica.adapters.apply(generation(2, {"one": 11, "two": 2}))
    replica.manager.unpin("one")
    replica.manager.unpin("one")
    assert replica.residency.calls == [("pin", "1"), ("pin", "b"), ("unpin", "1"), ("unpin", "b")]
    assert not replica.manager.get("one").pinned


def test_names_of_one_version_share_its_pin() -> None:
    """A version stays pinned until its last pinned name is unpinned."""
    replica = managed_replica({"a": 1, "b": 1})
    for name in ("a", "b"):
        replica.manager.pin(name)
    replica.manager.unpin("a")
    assert ("unpin", "1") not in replica.residency.calls
    replica.manager.unpin("b")
    assert replica.residency.calls[-1] == ("unpin", "1")


def test_the_successor_of_a_resident_version_is_brought_in() -> None:
    """A new version of a resident adapter is prefetched, and both digests are reported."""
    replica = managed_replica()
    replica.residency.hold(replica.adapter("one"))
    replica.adapters.apply(generation(2, {"one": 11, "two": 12}))
    assert replica.residency.calls == [("prefetch", "b")]
    replica.adapter("one").slot = None
    view = replica.manager.get("one")
    assert (view.digest, view.resident_digest, view.generation) == (digest_of(11), digest_of(1), 2)


def test_a_removed_name_leaves_unless_another_stands_for_its_version() -> None:
    """A version without a name may leave at once; its pin is forgotten."""
    replica = managed_replica({"a": 1, "b": 1, "c": 3})
    replica.manager.pin("a")
    replica.manager.pin("c")
    replica.adapters.apply(generation(2, {"b": 1}))
    assert replica.residency.calls[2:] == [("unpin", "1"), ("unpin", "3"), ("drop", "3")]
    assert replica.manager.replica().pinned == 0


async def test_a_new_name_that_others_took_meanwhile_is_taken() -> None:
    """Another replica's load of the name wins; another's of another name is no matter."""
    replica = managed_replica()
    replica.deployment.racing = [{"one": 1, "two": 2, "other": 9}]
    await replica.manager.load("three", "org/three")
    assert set(replica.deployment.newest.adapters) == {"one", "two", "three", "other"}
    replica.deployment.racing = [{"four": 9}]
    with pytest.raises(faults.AdapterExists, match="has already been loaded"):
        await replica.manager.load("four", "org/four")
    assert replica.manager.get("four")  # a client that takes the refusal for success finds it here


async def test_without_a_builder_only_bundles_are_loaded() -> None:
    """The answer says that bundles are in this replica alone; a generation that has the name takes it over."""
    digest = digest_of(77)
    replica = managed_replica(builder=False, bundles=(digest,))
    for attempt in (
        replica.manager.load("three", "org/three"),
        replica.manager.unload("one"),
        replica.manager.roll_back(),
    ):
        with pytest.raises(faults.NoBuilder, match="--builder"):
            await attempt
    loaded = await replica.manager.load("mine", f"bundle:{digest}")
    assert (loaded.everywhere, loaded.adapter.only_here, loaded.adapter.digest) == (False, True, digest)
    with pytest.raises(faults.AdapterExists):
        await replica.manager.load("mine", f"bundle:{digest}")
    with pytest.raises(faults.RequestInvalid, match="lora_name"):
        await replica.manager.load("one", f"bundle:{digest}", replace=True)
    with pytest.raises(faults.BundleNotFound):
        await replica.manager.load("other", f"bundle:{digest_of(78)}")
    replica.adapters.apply(generation(2, {"one": 1}))
    assert replica.manager.get("mine").only_here
    replica.adapters.apply(generation(3, {"one": 1, "mine": 5}))
    assert not replica.manager.get("mine").only_here
    assert replica.manager.get("mine").digest == digest_of(5)


async def test_a_bundle_of_this_replica_obeys_the_rules_of_names() -> None:
    """A bundle of a replica cannot have an alias's name, and is dropped when a generation has its name."""
    digest = digest_of(77)
    replica = managed_replica(bundles=(digest,))
    started = replica.deployment.newest.model_copy(update={"aliases": {"al": {"one": 1}}})
    replica.adapters.apply(started)
    for name, found in (("al", "alias al"), ("AL", "alias al"), ("One", "adapter one"), ("a*2", "'a*2'")):
        with pytest.raises(faults.RequestInvalid) as refused:
            await replica.manager.load(name, f"bundle:{digest}", replace=True)
        assert (refused.value.findings[0].where, refused.value.findings[0].found) == ("lora_name", found)
    with pytest.raises(faults.RequestInvalid, match="the base base"):
        await replica.manager.load("base", f"bundle:{digest}")
    await replica.manager.load("mine", f"bundle:{digest}")
    await replica.manager.load("mine", f"bundle:{digest}", replace=True)
    with pytest.raises(faults.RequestInvalid, match="adapter mine"):
        await replica.manager.load("Mine", f"bundle:{digest}")
    replica.adapters.apply(started.model_copy(update={"number": 3, "aliases": {"Mine": {"one": 1}}}))
    with pytest.raises(faults.ModelNotFound):
        replica.manager.get("mine")


async def test_what_is_unloaded_is_gone_when_it_returns() -> None:
    """An unload goes through the builder for an adapter of a generation, else ends on this replica."""
    digest = digest_of(77)
    replica = managed_replica(bundles=(digest,))
    assert await replica.manager.unload("one") == 2
    await replica.manager.load("mine", f"bundle:{digest}")
    assert await replica.manager.unload("mine") is None
    for name in ("one", "mine"):
        with pytest.raises(faults.ModelNotFound):
            replica.manager.get(name)
    with pytest.raises(faults.ModelNotFound):
        await replica.manager.unload("one")


async def test_a_fixed_replica_serves_what_it_has() -> None:
    """All is resident, pins change nothing, and nothing can be loaded or waited for."""
    models = [ServedModel("base"), ServedModel("merged", digest=digest_of(9))]
    manager = fixed_manager(Catalog(4, "base", models))
    assert manager.get("merged").tier == "device"
    with pytest.raises(faults.RequestInvalid, match="merged"):
        manager.pin("merged")
    with pytest.raises(faults.NoBuilder):
        await manager.load("x", f"bundle:{digest_of(1)}")
    view = manager.replica()
    assert (view.state, view.generation, view.registered, view.resident) == ("fixed", 4, 1, 0)


async def test_a_replica_that_cannot_catch_up_says_so() -> None:
    """A change that was published and is not served here is no success."""
    replica = managed_replica()

    async def nothing(name: str) -> int:
        return 99

    replica.deployment.remove = nothing  # type: ignore[method-assign]
    with pytest.raises(faults.ReplicaBehind):
        await replica.manager.unload("one")


@pytest.mark.parametrize(("path", "kind", "repo"), cases(__file__, "test_paths_are_repositories"))
def test_paths_are_repositories(path: str, kind: str, repo: str) -> None:
    """Every form of `lora_path` is a repository of its source."""
    found = repository_of(path)
    assert (found.source, found.repo) == (kind, repo)


@pytest.mark.parametrize("path", ["", ".", "../x", "~/x", "/a/../etc", "ftp://x/y", "a b", "file:///x", "x\0y"])
def test_what_is_no_path_is_refused(path: str) -> None:
    """Other forms of `lora_path` are refused by its name."""
    with pytest.raises(faults.RequestInvalid, match="lora_path"):
        repository_of(path)


def test_bundles_are_named_by_whole_digests() -> None:
    """A path of a bundle has a digest of 64 hex digits."""
    assert digest_in(f"bundle:{digest_of(3)}") == digest_of(3)
    assert digest_in("org/name") is None
    for wrong in ("bundle:", "bundle:abc", f"bundle:{digest_of(3)}0", f"bundle:{'G' * 64}"):
        with pytest.raises(faults.RequestInvalid):
            digest_in(wrong)
