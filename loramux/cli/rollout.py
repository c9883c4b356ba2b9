"""``loramux rollout``: wait until all replicas serve a generation."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import typer

from loramux.cli import shell
from loramux.cli.documents import emit_line
from loramux.cli.exits import Exit
from loramux.client import INFERENCE, AsyncClient
from loramux.connection import Address, resolve
from loramux_shared.faults import Fault, PermissionDenied, SettingsInvalid, Status, Unauthenticated
from loramux_shared.operations import ReplicaStatus

RETRY_S: Final = 1.0
"""Before a replica that does not answer is asked again: it may be on its way."""


@dataclass(frozen=True)
class RolloutState:
    """The state of a replica during a rollout."""

    replica: str
    status: ReplicaStatus | None
    problem: str = ""
    """Why it does not answer, or cannot take the generation over."""


@shell.command
def rollout(
    deployment: Annotated[
        str, typer.Argument(metavar="DEPLOYMENT", help="Name of the deployment.", show_default=False)
    ],
    replicas: Annotated[
        str, typer.Option("--replicas", metavar="LIST", help="Replicas: HOST:PORT,... or dns:///NAME:PORT")
    ] = INFERENCE,
    generation: Annotated[
        int | None,
        typer.Option(
            "--generation", metavar="N", min=1, help="Generation; default: the newest that a replica saw."
        ),
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", metavar="SECONDS", min=0, help="Timeout.")] = 120.0,
    as_json: shell.JsonLines = False,
) -> None:
    """Watch replicas until all serve a generation.

    The exit status is 3 where that takes too long.

    Example: loramux rollout my-model --replicas dns:///replicas:50052
    """
    watch = Rollout(deployment, resolve(replicas), generation, as_json=as_json)
    done = asyncio.run(watch.run(timeout_s))
    watch.summarize(done=done)
    if not done:
        raise typer.Exit(Exit.FAILED if watch.hopeless else Exit.UNAVAILABLE)


class Rollout:
    """Watch several replicas at once, and print each change of one."""

    def __init__(
        self, deployment: str, addresses: Sequence[Address], generation: int | None, *, as_json: bool
    ) -> None:
        self._deployment = deployment
        self._wanted = generation
        self._as_json = as_json
        self._addresses = addresses
        self._known: dict[str, RolloutState] = {
            each.target: RolloutState(each.target, None) for each in addresses
        }
        self._changed = asyncio.Event()

    @property
    def goal(self) -> int | None:
        """The generation that all must serve; None until a replica answers."""
        seen = [each.status.newest_generation for each in self._known.values() if each.status]
        return self._wanted or max(seen, default=None)

    @property
    def hopeless(self) -> bool:
        """True where a replica that answers says that waiting will not help."""
        return any(each.status and each.status.state in ("stale", "fixed") for each in self._late())

    async def run(self, timeout_s: float) -> bool:
        """Watch until all serve the generation; False when the time ran out."""
        tasks = [asyncio.create_task(self._watch(address)) for address in self._addresses]
        try:
            async with asyncio.timeout(timeout_s):
                while not all(each.status for each in self._known.values()) or self._late():
                    if (failed := next((each for each in tasks if each.done()), None)) is not None:
                        failed.result()
                    await self._changed.wait()
                    self._changed.clear()
        except TimeoutError:
            return False
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return True

    def summarize(self, *, done: bool) -> None:
        """Print the result."""
        goal = self.goal
        if self._as_json:
            emit_line({"done": done, "generation": goal, "replicas": list(self._known.values())})
            return
        if done:
            many = len(self._known)
            shell.show(f"generation {goal} is served by {many} {'replica' if many == 1 else 'replicas'}")
            return
        for each in self._late():
            served = f"serves {each.status.generation}" if each.status else "did not answer"
            why = f": {each.problem}" if each.problem else ""
            shell.say(f"{each.replica} {served}{why}")

    def _late(self) -> list[RolloutState]:
        goal = self.goal or 0
        return [each for each in self._known.values() if not each.status or each.status.generation < goal]

    async def _watch(self, address: Address) -> None:
        try:
            while True:
                await self._listen(address)
                await asyncio.sleep(RETRY_S)
        finally:
            self._changed.set()

    async def _listen(self, address: Address) -> None:
        """Print the states of a replica until its stream ends; raises faults that a retry does not cure."""
        try:
            async with AsyncClient(inference=address.target, tls_name=address.name) as client:
                async for status in client.watch_replica():
                    self._check(address.target, status)
                    self._tell(RolloutState(address.target, status, status.reason))
        except (PermissionDenied, Unauthenticated, SettingsInvalid):
            raise
        except Fault as fault:
            if fault.status is not Status.UNAVAILABLE:
                raise
            self._tell(RolloutState(address.target, None, fault.message))

    def _check(self, address: str, status: ReplicaStatus) -> None:
        if status.deployment != self._deployment:
            problem = f"expected a replica of {self._deployment!r}, found one of {status.deployment!r}"
            raise SettingsInvalid(f"{address}: {problem}.")

    def _tell(self, progress: RolloutState) -> None:
        before = self._known[progress.replica]
        self._known[progress.replica] = progress
        self._changed.set()
        status = progress.status
        standing = _standing(progress)
        if standing == _standing(before):
            return
        if self._as_json:
            emit_line({"replica": progress.replica, "status": status, "problem": progress.problem})
        else:
            shell.say(f"{time.strftime('%H:%M:%S')} {progress.replica} {standing}")


def _standing(progress: RolloutState) -> str:
    if progress.status is None:
        return f"does not answer: {progress.problem}" if progress.problem else ""
    why = f": {progress.problem}" if progress.problem else ""
    return f"serves {progress.status.generation}, {progress.status.state}{why}"
