"""Unreferenced objects: found, spared while they are young, removed on request."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

import pytest
from typer.testing import CliRunner

from builder_service.pipeline.build import build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.making import outlast_removal
from builder_service.pipeline.progress import Progress
from builder_service.pipeline.update import rollback
from loramux.cli.main import app
from loramux_shared.bundle.claims import generation_numbers
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.bundle.generation import claim_key, generation_key
from loramux_shared.bundle.manifest import MANIFEST_FILE, bundle_key
from loramux_shared.bundle.orphans import Kind, Retention, check_grace, find_orphans, remove
from loramux_shared.bundle.reader import read_bundle, read_manifest
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.faults import BuildInProgress, BundleCorrupt
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.base import Entry, Store
from loramux_shared.storage.local import LocalStore
from loramux_shared.storage.memory import MemoryStore
from tests.support.adapters import tensors, write_adapter, write_base

DAY = timedelta(days=1)
LATER = datetime.now(UTC) + timedelta(days=2)


def publish(folder: Path, store: Store, *names: str, deployment: str = "tiny") -> None:
    """Build a deployment of adapters that differ by their names."""
    write_base(folder / "base")
    for name in names:
        write_adapter(folder / name, tensors(seed=sum(name.encode())))
    local = {name: {"source": "LOCAL", "repo": str(folder / name)} for name in names}
    base = {"source": "LOCAL", "repo": str(folder / "base")}
    data = {"model_name": deployment, "build": {"checkpoint_repository": base, "lora_adapters": local}}
    context = BuildContext(store, open_sources(local_roots=[folder]), folder / "work")
    build(parse_deployment(data).deployment, context, Progress(names))


def published(folder: Path, *generations: str) -> MemoryStore:
    store = MemoryStore()
    for names in generations:
        publish(folder, store, *names.split())
    return store


def digest(store: Store, name: str) -> str:
    generation = current_generation(store, "tiny")
    return generation.adapters[name].digest


def lose_generation(store: MemoryStore, number: int) -> None:
    """Remove a generation behind everyone's back, so that its bundles are orphans."""
    del store.objects[generation_key("tiny", number)]


def test_a_store_in_order_has_no_orphans(tmp_path):
    """All generations are kept by default, and with them all that they refer to."""
    store = published(tmp_path, "one", "two")
    found = find_orphans(store, grace=timedelta(), now=LATER)
    assert (found.old, found.young) == ((), ())


def test_what_a_killed_build_left_is_found(tmp_path):
    """Bundles without a generation or without a manifest, and claims below a generation, are orphans."""
    store = published(tmp_path, "one two three")
    lost = digest(store, "two"), digest(store, "three")
    publish(tmp_path, store, "one")
    lose_generation(store, 1)
    del store.objects[bundle_key(lost[1], MANIFEST_FILE)]
    store.put(claim_key("tiny", 1, "0" * 16), b"")
    store.put(claim_key("tiny", 3, "0" * 16), b"")  # whose builder may live
    found = {orphan.name: orphan for orphan in find_orphans(store, grace=DAY, now=LATER).old}
    assert set(found) == {*lost, claim_key("tiny", 1, "0" * 16)}
    assert found[lost[0]].why == "no generation refers to it"
    assert found[lost[1]].why == "without its manifest: a build was interrupted"
    assert found[lost[0]].entries[0].key.endswith(MANIFEST_FILE)
    assert found[lost[0]].size == sum(len(store.get(entry.key)) for entry in found[lost[0]].entries)


def test_removal_leaves_what_is_referred_to(tmp_path):
    """A removal leaves every generation complete, and nothing else."""
    store = published(tmp_path, "one two", "one")
    lose_generation(store, 1)
    for orphan in find_orphans(store, grace=DAY, now=LATER).old:
        assert remove(store, orphan)
    read_bundle(store, digest(store, "one"))
    assert len({key.split("/")[2] for key in store.list("bundles/")}) == 1


def test_the_young_are_spared(tmp_path):
    """An object within the grace period is listed apart."""
    store = published(tmp_path, "one two", "one")
    lose_generation(store, 1)
    found = find_orphans(store, grace=DAY, now=datetime.now(UTC) + timedelta(hours=23))
    assert (found.old, len(found.young)) == ((), 1)


def test_a_bundle_that_a_build_found_again_is_spared(tmp_path):
    """A build that reuses an orphan puts its manifest again; a removal that was about to begin lets it be."""
    store = published(tmp_path, "one two", "one")
    lose_generation(store, 1)
    [orphan] = find_orphans(store, grace=DAY, now=LATER).old
    publish(tmp_path, store, "two")
    assert not remove(store, orphan)
    assert find_orphans(store, grace=DAY, now=LATER).old == ()
    read_bundle(store, orphan.name)


class Meeting(MemoryStore):
    """A store in which a builder needs a bundle again at a drawn request of its removal."""

    def __init__(self, at: int, need: Callable[[Self], None]) -> None:
        super().__init__()
        self.left, self.need = at, need

    def meet(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.need(self)

    def delete(self, key: str) -> None:
        self.meet()
        super().delete(key)

    def put(self, key: str, data: bytes | Path) -> None:
        super().put(key, data)
        self.meet()

    def entries(self, prefix: str) -> Iterator[Entry]:
        found = list(super().entries(prefix))
        self.meet()
        yield from found


@pytest.mark.parametrize("at", range(1, 7))
def test_a_bundle_that_is_needed_while_it_is_removed(tmp_path, at):
    """A builder that reuses a bundle while it is removed keeps it whole, or is told that it goes."""
    source = published(tmp_path, "a b", "a")
    lose_generation(source, 1)
    ends: list[str] = []

    def need(store: Meeting) -> None:
        store.left = 0

        def let_go_on(_: float) -> None:
            raise InterruptedError

        try:
            hold_bundle(store, let_go_on)
            ends.append("kept")
        except BundleCorrupt:
            ends.append("gone")
        except InterruptedError:
            ends.append("waits")

    [orphan] = (each for each in find_orphans(source, grace=DAY, now=LATER).old if each.kind is Kind.BUNDLE)

    def hold_bundle(store: Store, wait: Callable[[float], None]) -> None:
        manifest = read_manifest(store, orphan.name)
        store.put(bundle_key(orphan.name, MANIFEST_FILE), manifest.to_bytes())
        outlast_removal(store, orphan.name, manifest.files, wait)

    store = Meeting(0, need)
    store.objects, store.modified = dict(source.objects), dict.fromkeys(source.objects, orphan.modified)
    store.left = at
    removed = remove(store, orphan)
    [end] = ends
    assert end != "kept" or not removed
    if not removed:
        hold_bundle(store, lambda _: None)
        read_bundle(store, orphan.name)
    assert not any(key.endswith("/removal") for key in store.objects)


def test_generations_beyond_those_that_are_kept(tmp_path):
    """Older generations and their objects are removed with keep; the served one and newer ones never."""
    store = published(tmp_path, "one", "two", "three", "two three")
    found = find_orphans(store, grace=DAY, now=LATER, retention=Retention(1))
    assert [orphan.kind for orphan in found.old] == [Kind.GENERATION, Kind.GENERATION, Kind.BUNDLE]
    for orphan in found.old:
        assert remove(store, orphan)
    assert generation_numbers(store, "tiny") == [3, 4]
    assert find_orphans(store, grace=DAY, now=LATER, retention=Retention(0)).old[0].name == generation_key(
        "tiny", 3
    )
    assert find_orphans(store, grace=DAY, now=LATER, retention=Retention(9)).old == ()


def test_what_stays_says_why(tmp_path):
    """A generation stays by either rule, number or age, and the report gives the reason."""
    store = published(tmp_path, "one", "two", "three", "two three")
    for number, days in ((1, 40), (2, 20), (3, 10)):
        store.modified[generation_key("tiny", number)] = LATER - days * DAY

    def retained(retention: Retention) -> dict[int, str]:
        found = find_orphans(store, grace=DAY, now=LATER, retention=retention)
        return {each.number: each.why for each in found.kept}

    assert retained(Retention(1)) == {4: "served", 3: "one of the 1 before the served one"}
    month = "published in the last 30 days"
    assert retained(Retention(age=30 * DAY)) == {4: "served", 3: month, 2: month}
    assert retained(Retention(1, 30 * DAY)) == {4: "served", 3: "one of the 1 before the served one", 2: month}
    assert set(retained(Retention())) == {1, 2, 3, 4}
    [served, *_] = find_orphans(store, grace=DAY, now=LATER).kept
    assert (served.deployment, served.bundles) == ("tiny", 2)


def test_nothing_of_a_deployment_goes_while_it_is_built(tmp_path):
    """An update may refer to bundles of any generation while the update is in the journal."""
    store = published(tmp_path, "one", "two", "three")
    store.put("builds/other/0123.json", b"")
    assert len(find_orphans(store, grace=DAY, now=LATER, retention=Retention(0)).old) == 4
    store.put("builds/tiny/0123.json", b"")
    found = find_orphans(store, grace=DAY, now=LATER, retention=Retention(0))
    assert found.old == ()
    assert {each.why for each in found.kept} == {"served", "its deployment is being built"}


def test_a_rollback_makes_its_bundles_young(tmp_path):
    """A removal that was about to begin lets the bundles be to which a rollback refers from now on."""
    store = published(tmp_path, "one", "two")
    going = find_orphans(store, grace=DAY, now=LATER, retention=Retention(0)).old
    context = BuildContext(store, open_sources(local_roots=[tmp_path]), tmp_path / "work")
    rollback("tiny", 1, None, context)
    assert [remove(store, orphan) for orphan in going if orphan.kind is Kind.BUNDLE] == [False]
    read_bundle(store, digest(store, "one"))


def test_a_damaged_generation_stops_everything(tmp_path):
    """A generation that cannot be read hides its references: nothing is an orphan and the damage is named."""
    store = published(tmp_path, "one", "two")
    store.put(generation_key("tiny", 1), b"{}")
    with pytest.raises(BundleCorrupt, match="deployment tiny: generation 1"):
        find_orphans(store, grace=DAY, now=LATER)
    assert {
        orphan.kind for orphan in find_orphans(store, grace=DAY, now=LATER, retention=Retention(0)).old
    } == {Kind.GENERATION, Kind.BUNDLE}


def test_a_short_grace_waits_for_builds():
    """A grace period below an hour is refused while a build runs."""
    store = MemoryStore()
    check_grace(store, timedelta())
    store.put("builds/tiny/builder.json", b"{}")
    check_grace(store, timedelta(hours=1))
    with pytest.raises(BuildInProgress, match=r"builds/tiny/builder\.json"):
        check_grace(store, timedelta(minutes=59))


def test_the_command(tmp_path):
    """`loramux gc` lists the bundles, reports what a removal would free, and removes only with --delete."""
    store, address = LocalStore(tmp_path / "store"), f"file://{tmp_path}/store"
    publish(tmp_path, store, "one", "two")
    lost = digest(store, "two")
    publish(tmp_path, store, "one")
    store.delete(generation_key("tiny", 1))
    run = CliRunner().invoke
    output = run(app, ["gc", "--store", address]).stdout
    assert "tiny: generation 2 stays: served; 1 bundle" in output
    assert "nothing to remove" in output
    assert "younger than 24h: spared" in output
    listed = run(app, ["gc", "--store", address, "--grace", "0"])
    assert lost[:12] in listed.stdout
    assert "1 orphan, " in listed.stdout
    assert "repeat with --delete" in listed.stdout
    read_bundle(store, lost)
    removed = run(app, ["gc", "--store", address, "--grace", "0s", "--delete"])
    assert (removed.exit_code, "1 orphan, " in removed.stdout) == (0, True)
    assert not list(store.list(f"bundles/sha256/{lost}"))
    read_bundle(store, digest(store, "one"))
    assert run(app, ["gc", "--store", address, "--grace", "soon"]).exit_code == 2
