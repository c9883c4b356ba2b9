"""Updates that end before they are done: kills at every step, cancels and restarts; and the commands."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from builder_service.pipeline.progress import Progress
from builder_service.pipeline.update import update
from loramux.cli.main import app
from loramux_shared.bundle.claims import generation_numbers
from loramux_shared.bundle.deployments import Identity, current_generation
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.faults import StoreUnavailable
from tests.contract.builds.test_turns import wish
from tests.support.builders import Builders, await_build
from tests.support.folders import run_build
from tests.support.stores.killed import DyingStore, Killed, copy_store


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Builders]:
    made = Builders(tmp_path)
    run_build(made.deployment("one"), made.context())
    yield made
    await made.close()


async def test_updates_that_are_refused_together_leave_nothing(world: Builders) -> None:
    """The newest build of a deployment is none that could not be recorded."""
    builds = world.builder()
    world.store.down = True
    calls = [builds.update(wish(world, name)) for name in ("two", "three")]
    assert [type(each) for each in await asyncio.gather(*calls, return_exceptions=True)] == 2 * [
        StoreUnavailable
    ]
    assert (await builds.get("tiny")).state == "ACTIVE"


@pytest.mark.parametrize("after", [False, True], ids=["before it took effect", "after it took effect"])
def test_an_update_killed_at_any_operation_is_made_once(world: Builders, after: bool) -> None:
    """Readers see the old generation or the new one, and the retry ends with both adapters."""
    query, context = wish(world, "two", expected_generation=1), world.context()
    identity = Identity(("an id",))
    for dies_at in range(1, 60):
        store = copy_store(world.store)
        mortal = DyingStore(store, dies_at, after=after)
        with suppress(Killed):
            update(query, replace(context, store=mortal), Progress(["two"]), identity)
        for record in current_generation(store, "tiny").adapters.values():
            read_bundle(store, record.digest)
        for key in store.list("deployments/tiny/claims/"):
            del store.modified[key]  # time went by since then
        update(query, replace(context, store=store), Progress(["two"]), identity)
        assert list(current_generation(store, "tiny").adapters) == ["one", "two"]
        assert len(generation_numbers(store, "tiny")) == 2
        if not mortal.dead:
            break
    assert 15 < mortal.count < 50


async def test_the_commands(world: Builders) -> None:
    """add, push, remove and build, on the one deployment that the builder has."""
    builds = world.builder()

    async def run(*words: str, code: int = 0) -> str:
        result = await asyncio.to_thread(CliRunner().invoke, app, [*words, "--builder", address])
        assert result.exit_code == code, result.output
        return result.stdout if code == 0 else result.stderr

    async with world.served(builds) as address:
        two, one = str(world.folder / "two"), str(world.folder / "one")
        assert "generation 2 is published" in await run("add", "2", two)
        lines = (await run("add", "3", one, "--source", "LOCAL", "-d", "tiny", "--json")).splitlines()
        assert json.loads(lines[-1])["deployment"]["generation"] == 3
        assert "generation 4 of tiny" in await run("push", two, "--name", "4")
        pushed = json.loads(await run("push", two, "--json"))
        assert (pushed["deployment"], pushed["pushed"]["generation"]) == ("tiny", 5)
        assert "generation 6 is published" in await run("remove", "2", "3", "two")
        assert "error: ADAPTER_NOT_FOUND" in await run("remove", "nine", code=1)
        assert "error: GENERATION_MISMATCH" in await run("add", "2", two, "--expect", "1", code=1)
        assert "error: ADAPTER_INVALID" in await run("add", "b", str(world.folder / "bad"), code=1)
        assert "error: DEPLOYMENT_INVALID" in await run("add", "b", "no repository", code=1)
        file = world.folder / "deployment.json"
        file.write_text(world.deployment("one").model_dump_json())
        assert "generation 6 is published, unchanged" in await run("build", str(file))
        await run("push", two, "--name", "5")
        again = await asyncio.to_thread(CliRunner().invoke, app, ["build", str(file), "--builder", address])
        assert "also served, since added or pushed: 4, 5 (a build with --exact removes them)" in again.stderr
        assert "also served" not in await run("build", str(file), "--exact")
        assert list(world.generation.adapters) == ["one"]
        outside = str(world.folder.parent)
        refused = await run("add", "b", outside, code=4)
        assert f"LOCAL {outside}: not below a folder that this server may read" in refused
        assert f"`loramux push {outside} --name b` sends it." in refused
        missing = await run("add", "b", str(world.folder / "none"), code=1)
        assert "REPO_NOT_FOUND" in missing
        assert "This machine has no such folder." in missing
        await builds.build(world.deployment("one", name="other"))
        await await_build(builds, "other")
        assert "which deployment? " in await run("push", two, code=1)
