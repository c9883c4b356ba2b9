"""Commands about deployments, builds and generations, and about the memory of a replica."""

import asyncio
import json
from collections.abc import Callable

from typer.testing import CliRunner

from loramux.cli.main import app
from tests.contract.builds.test_build_lifecycle import world as world
from tests.support.builders import Builders, await_build
from tests.support.processes.commands import run
from tests.support.services.fake_grpc import Fakes
from tests.support.services.managed_replica import managed_replica, serve_adapters
from tests.support.waiting import result_of
from tests.unit.cli.test_cli import documents


def test_deployments_and_cancel(fakes: Fakes, deployment: Callable[..., str]) -> None:
    """``deployments`` lists all or shows one; ``cancel`` reports whether a build was cancelled."""
    documents("build", deployment("listed", "lora1"), "--builder", fakes.builder_address)
    [listed] = documents("deployments", "--builder", fakes.builder_address)
    assert "listed" in [info["name"] for info in listed["deployments"]]
    [one] = documents("deployments", "listed", "--builder", fakes.builder_address)
    assert [info["name"] for info in one["deployments"]] == ["listed"]
    [cancelled] = documents("cancel", "listed", "--builder", fakes.builder_address)
    assert (cancelled["cancelled"], cancelled["deployment"]["state"]) == (False, "active")
    [error] = documents("deployments", "nothing", "--builder", fakes.builder_address, code=1)
    assert error["error"]["reason"] == "DEPLOYMENT_NOT_FOUND"


def test_deployments_for_people(fakes: Fakes, deployment: Callable[..., str]) -> None:
    """The output without ``--json`` is a table."""
    documents("build", deployment("shown", "lora1", "lora2"), "--builder", fakes.builder_address)
    result = CliRunner().invoke(app, ["deployments", "shown", "--builder", fakes.builder_address])
    header, row = result.stdout.splitlines()
    assert header.split() == ["deployment", "state", "generation", "adapters", "changed", "failure"]
    assert row.split()[:4] == ["shown", "active", "3", "2"]


def test_watch_ends_as_the_build_did(fakes: Fakes, deployment: Callable[..., str]) -> None:
    """``watch`` of a build that ended gives its last line, as ``build`` did."""
    lines = documents("build", deployment("watched", "lora1"), "--builder", fakes.builder_address)
    assert documents("watch", "watched", "--builder", fakes.builder_address)[-1] == lines[-1]


async def test_the_cancel_command(world: Builders) -> None:
    """`loramux cancel` waits for the end of the build and prints it; without a build it prints the state."""
    builds = world.builder()
    async with world.served(builds) as address:
        words = ["cancel", "tiny", "--builder", address]
        await builds.build(world.deployment("one"))
        call = asyncio.create_task(asyncio.to_thread(CliRunner().invoke, app, words))
        await result_of(world.stopping(builds).wait(), "the cancel at the builder")
        world.store.gate.set()
        first = await call
        assert (first.exit_code, first.stdout.splitlines()[-1]) == (0, "tiny: failed, BUILD_CANCELLED")
        again = await asyncio.to_thread(CliRunner().invoke, app, words)
        assert (again.exit_code, again.stdout) == (0, "tiny: no build runs; it is failed\n")


async def test_history_and_rollback(world: Builders) -> None:
    """``history`` lists what each generation changed; ``rollback`` publishes an older one again."""

    async def run(*words: str, code: int = 0) -> str:
        result = await asyncio.to_thread(CliRunner().invoke, app, [*words, "--builder", address])
        assert result.exit_code == code, result.output
        return result.stdout if code == 0 else result.stderr

    world.store.gate.set()
    builds = world.builder()
    async with world.served(builds) as address:
        await builds.build(world.deployment("one"))
        await await_build(builds, "tiny")
        for name in ("two", "three"):
            await run("add", name, str(world.folder / "two"))
        await run("remove", "two", "three")
        stated = await run("history")
        assert [line.split()[0] for line in stated.splitlines()[1:]] == ["4", "3", "2", "1"]
        assert "-three, two" in stated.splitlines()[1]
        stated = await run("rollback", "tiny", "--to", "3")
        assert "generation 5 is published, as generation 3\nchanges: +three, two\n" in stated
        assert list(world.generation.adapters) == ["one", "three", "two"]
        assert "generation 6 is published, as generation 4\nchanges: -three, two\n" in await run("rollback")
        assert "generation 7 is published, as generation 3" in await run("rollback", "--to", "3")
        assert "`loramux rollback --to 1`" in await run("rollback", "1", code=1)
        history = json.loads(await run("history", "tiny", "--limit", "1", "--json"))
        assert [each["number"] for each in history["generations"]] == [7]
        await builds.build(world.deployment("one", name="other"))
        await await_build(builds, "other")
        assert "which deployment? " in await run("history", code=1)


def test_a_pin_is_reported() -> None:
    """A pin is printed as a line and as a document; a name that is not served fails."""
    with serve_adapters(managed_replica()) as (address, _):
        assert run("pin", "one", "--grpc", address) == (0, "one: pinned, 000000000000, resident\n", "")
        code, text, _ = run("unpin", "one", "--grpc", address, "--json")
        assert (code, json.loads(text)["adapter"]["pinned"]) == (0, False)
        assert run("pin", "nobody", "--grpc", address)[0] == 1
