"""How updates end before they are done: kills at every step, cancels, builders that take over; and commands."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from builder_service.builds.journal import Journal, JournalEntry
from builder_service.builds.views import State
from builder_service.pipeline.build import build
from builder_service.pipeline.check import Checks
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from builder_service.pipeline.update import update
from builder_service.pipeline.wishes import Update
from builder_service.rpc.servicer import SERVICE_NAME, BuilderServicer
from loramux.cli.main import app
from loramux_shared.bundle.claims import generation_numbers
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.bundle.generation import Generation
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.rpc.server import RpcServer
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.contract.builds.test_build_lifecycle import OTHER, OWNER, World, ended, until
from tests.contract.builds.test_kill_sweep import Killed, Mortal


def wish(folder: Path, *names: str, **fields: Any) -> Update:
    """An update that adds adapters below a folder."""
    local = {name: Repository(source=SourceKind.LOCAL, repo=str(folder / name)) for name in names}
    return Update(name="tiny", add=local, **fields)


def served(store: Any) -> Generation:
    """What a replica reads."""
    found = current_generation(store, "tiny")
    assert found is not None
    return found


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A world that serves one adapter, with an open gate."""
    made = World(tmp_path)
    made.store.gate.set()
    builds = made.builder()
    await builds.build(made.deployment("one"))
    await ended(builds)
    yield made
    made.store.gate.set()
    for each in made.started:
        await each.drain(10)


def context(store: Any, folder: Path) -> BuildContext:
    """A builder's."""
    return BuildContext(store, open_sources(local_roots=[folder]), folder / "work")


@pytest.mark.parametrize("after", [False, True], ids=["before it took effect", "after it took effect"])
def test_an_update_killed_at_any_operation_is_made_once(tmp_path: Path, after: bool) -> None:
    """Readers see the old generation or the new one, and the retry ends with both adapters."""
    made = World(tmp_path)
    made.store.gate.set()
    asked = wish(tmp_path, "two", expected_generation=1)
    operations = 0
    for dies_at in range(1, 60):
        store = MemoryStore()
        base = context(store, tmp_path)
        build(made.deployment("one"), base, Progress(["one"]))
        mortal = Mortal(store, dies_at, after=after)
        with suppress(Killed):
            update(asked, replace(base, store=mortal), Progress(["two"]))
        for name in served(store).adapters:
            read_bundle(store, served(store).adapters[name].digest)
        for key in store.list("deployments/tiny/claims/"):
            del store.modified[key]  # time went by since then
        update(asked, base, Progress(["two"]), again=True)
        assert list(served(store).adapters) == ["one", "two"]
        assert len(generation_numbers(store, "tiny")) == 2
        operations = mortal.count
        if not mortal.dead:
            break
    assert 15 < operations < 50


async def test_the_update_of_a_dead_builder_is_taken_over(world: World) -> None:
    """An update in the journal whose builder gives no sign of life is made by another one."""
    entry = JournalEntry(update=wish(world.folder, "two"), create_time=datetime.now(UTC))
    Journal(world.store, OTHER).write(entry)
    builds = world.builder("2" * 16, beat_s=0.05, lease_s=0.2)
    await builds.recover()
    await until(lambda: len(served(world.store).adapters) == 2)
    await until(lambda: not list(world.store.list("builds/")))


async def test_an_update_goes_on_after_a_restart(world: World) -> None:
    """The builder's own journal entry is taken up at its next start."""
    entry = JournalEntry(update=wish(world.folder, "two", remove=("one",)), create_time=datetime.now(UTC))
    Journal(world.store, OWNER).write(entry)
    builds = world.builder()
    assert await builds.recover() == 1
    assert (await ended(builds)).state is State.ACTIVE
    assert list(served(world.store).adapters) == ["two"]


async def test_a_cancelled_update_leaves_what_is_served(world: World) -> None:
    """It ends as BUILD_CANCELLED, and the deployment is what it was."""
    builds = world.builder()
    world.store.gate.clear()
    await builds.update(wish(world.folder, "two"))
    await builds.cancel("tiny")
    world.store.gate.set()
    last = await ended(builds)
    assert (last.state, last.failure.reason if last.failure else "") == (State.FAILED, "BUILD_CANCELLED")
    assert list(served(world.store).adapters) == ["one"]


class Commands:
    """The command line against a served builder."""

    def __init__(self, address: str) -> None:
        self.address = address

    async def __call__(self, *words: str, code: int = 0) -> str:
        """Run a command; returns its stdout."""
        args = [*words, "--builder", self.address]
        result = await asyncio.to_thread(CliRunner().invoke, app, args)
        assert result.exit_code == code, result.output
        return result.stdout if code == 0 else result.stderr


async def test_the_commands(world: World) -> None:
    """add, push, remove, history and rollback, on the one deployment that the builder has."""
    builds = world.builder()
    server = RpcServer("127.0.0.1:0", {SERVICE_NAME: BuilderServicer(builds, Checks(builds._context)).register})
    run = Commands(await server.start())
    two, one = str(world.folder / "two"), str(world.folder / "one")
    assert "generation 2 is published" in await run("add", "2", two)
    lines = (await run("add", "3", one, "--source", "LOCAL", "-d", "tiny", "--json")).splitlines()
    assert json.loads(lines[-1])["deployment"]["generation"] == 3
    assert "generation 4 of tiny" in await run("push", two, "--name", "4")
    pushed = json.loads(await run("push", two, "--json"))
    assert (pushed["deployment"], pushed["pushed"]["generation"]) == ("tiny", 5)
    assert "generation 6 is published" in await run("remove", "2", "3", "two")
    said = await run("history")
    assert [line.split()[0] for line in said.splitlines()[1:]] == ["6", "5", "4", "3", "2", "1"]
    assert "-2, 3, two" in said.splitlines()[1]
    assert "generation 7 is published, as generation 3" in await run("rollback", "tiny", "--to", "3")
    assert list(served(world.store).adapters) == ["2", "3", "one"]
    history = json.loads(await run("history", "tiny", "--limit", "1", "--json"))
    assert [each["number"] for each in history["generations"]] == [7]
    assert "error: ADAPTER_NOT_FOUND" in await run("remove", "nine", code=1)
    assert "error: GENERATION_MISMATCH" in await run("add", "2", two, "--expect", "1", code=1)
    assert "error: ADAPTER_INVALID" in await run("add", "b", str(world.folder / "bad"), code=1)
    assert "error: DEPLOYMENT_INVALID" in await run("add", "b", "no repository", code=1)
    await builds.build(world.deployment("one", name="other"))
    await ended(builds, "other")
    assert "which deployment? " in await run("history", code=1)
    await server.drain(5)
