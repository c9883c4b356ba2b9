"""The API processes of a replica: started, watched, drained, and started again where one ends."""

import asyncio
import os
import signal
import socket
from asyncio.subprocess import Process
from collections.abc import Callable, Collection, Coroutine
from contextlib import suppress
from itertools import chain, repeat
from typing import Any, Final

import structlog

from inference_service.api.processes.host import ApiHost, ApiPeer
from inference_service.api.processes.remote import deployed_to, served_to
from inference_service.api.requests.service import GenerationService
from loramux_shared.faults import Fault, ReplicaFailed
from loramux_shared.process import SOCKET, python
from loramux_shared.rpc.options import listen, reserve
from loramux_shared.settings import InferenceSettings

log = structlog.get_logger()

HUNG_S: Final = 10.0
"""A process that answers nothing for so long is ended, and another is started."""
LOOK_S: Final = 1.0
"""Between two looks at whether a process answers."""
START_S: Final = 120.0
"""For a process to listen that takes the place of another."""
HEAR_S: Final = 1.0
"""For a process to report other health; one that stands still is not waited for."""
PAUSES_S: Final = (0.0, 0.5, 1.0, 2.0)
"""Before each attempt to start a process again; the last one counts for all that follow."""
ENDED_S: Final = 5.0
"""Above the time that a drain takes, for a process to end by itself."""
ON_THE_WAY: Final = 16 << 10
"""Bytes of outputs that a process did not read yet, twice; behind them, an answer of the engine waits."""
MODULE: Final = "inference_service.api.processes.api"
PASSED: Final = (
    *("deployment", "batch_store", "keys_file", "tls_cert", "tls_key", "tls_client_ca", "insecure"),
    *("stall_timeout_s", "log_format", "log_prompts", "tool_parser", "reasoning_parser"),
)
"""Settings that concern the APIs."""


class ApiProcesses:
    """The API processes of a replica, as one server."""

    def __init__(
        self,
        settings: InferenceSettings,
        service: GenerationService,
        count: int,
        services: Collection[str],
        relay: str,
        *,
        keyless: bool,
        start_s: float = START_S,
        hung_s: float = HUNG_S,
        look_s: float = LOOK_S,
    ) -> None:
        """Serve services of these names; relay is the address of the engine's own server."""
        self._about = {"services": list(services), "relay": relay}
        self.host = ApiHost(service, keyless=keyless)
        self.start_s, self.hung_s, self.look_s = start_s, hung_s, look_s
        self.ending = self.serving = False
        self._settings = settings
        self._children = [_Child(self) for _ in range(count)]
        self._port: socket.socket | None = None
        self._listener: socket.socket | None = None
        self._addresses = {"grpc": settings.grpc, "http": settings.http}

    @property
    def pids(self) -> list[int]:
        """Ids of the processes that run."""
        return [child.process.pid for child in self._children if child.process is not None]

    async def start(self) -> dict[str, str]:
        """Start them, and return the addresses that they listen on.

        Raises:
            SettingsInvalid: an address is taken or no ``HOST:PORT``, or the files of TLS are no good.
            ReplicaFailed: a process ended before it was ready.
        """
        self._port, self._addresses["grpc"] = reserve(self._settings.grpc)
        if self._settings.http is not None:
            self._listener = listen(self._settings.http)
            host, port = self._settings.http.rpartition(":")[0], self._listener.getsockname()[1]
            self._addresses["http"] = f"{host}:{port}"
        self.host.service.local.catalog.watchers.append(self._announce)
        await asyncio.gather(*(child.start() for child in self._children))
        return {name: address for name, address in self._addresses.items() if address is not None}

    def facts(self) -> dict[str, Any]:
        """Return what a process begins with."""
        dumped = self._settings.model_dump(mode="json", include=set(PASSED))
        http = None
        if self._listener is not None:
            http = [self._listener.fileno(), self._addresses["http"]]
        return {
            **self._about,
            "settings": dumped | {"api_keys": self._settings.api_keys.get_secret_value()},
            "served": served_to(self.host.service),
            "grpc": self._addresses["grpc"],
            "http": http,
        }

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Descriptors that a process inherits."""
        return () if self._listener is None else (self._listener.fileno(),)

    async def set_serving(self) -> None:
        """Have every process report good health, those to come too."""
        self.serving = True
        await self._tell("serve")

    async def leave(self) -> None:
        """Have every process report bad health, those to come too, and go on taking requests."""
        self.serving = False
        await self._tell("leave")

    async def refuse(self) -> None:
        """Have every process take no new requests."""
        self.serving = False
        await self._tell("refuse")

    async def drain(self, timeout_s: float, cut: Callable[[], None] | None = None) -> bool:  # noqa: ARG002
        """Let all requests end, then the processes; False where some were cut, by the processes' own word."""
        self.ending = True
        for each in (self._port, self._listener):
            if each is not None:  # the processes have theirs; behind the last one, nobody would accept
                each.close()
        return all(await asyncio.gather(*(child.end(timeout_s) for child in self._children)))

    async def _tell(self, word: str) -> None:
        """Ask every process for something, and wait for those that answer."""
        answers = [child.peer.channel.ask(word) for child in self._children if child.peer is not None]
        with suppress(TimeoutError):
            async with asyncio.timeout(HEAR_S):
                await asyncio.gather(*answers, return_exceptions=True)

    def _announce(self) -> None:
        """Tell every process what the generation says about requests."""
        deployed = deployed_to(self.host.service.local.catalog)
        for child in self._children:
            if child.peer is not None:
                child.peer.channel.say("deployed", deployed)


class _Child:
    """One API process, and those that take its place."""

    def __init__(self, all_: ApiProcesses) -> None:
        self._all = all_
        self.process: Process | None = None
        self.peer: ApiPeer | None = None
        """None until a process listens."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start a process, and return when it listens.

        Raises:
            SettingsInvalid: an address cannot be listened on.
            ReplicaFailed: it ended before.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            descriptors = (theirs.fileno(), *self._all.descriptors)
            environment = {name: value for name, value in os.environ.items() if name != SOCKET}
            process = self.process = await asyncio.create_subprocess_exec(
                *python(MODULE, str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=descriptors,
                env=environment,
            )
        peer = ApiPeer(self._all.host, lambda: self._on_lost(process))
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ON_THE_WAY)
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: peer.channel, sock=ours)
        transport.set_write_buffer_limits(ON_THE_WAY)
        try:
            await peer.channel.ask("begin", self._all.facts())
        except ReplicaFailed:
            status = await process.wait()
            raise ReplicaFailed(
                f"an API process ended with {status} before it was ready; the log above says why."
            ) from None
        except BaseException:  # also where it takes too long
            peer.channel.close()
            raise
        self.peer = peer
        self._host.peers.add(peer)
        peer.channel.say(
            "deployed", deployed_to(self._host.service.local.catalog)
        )  # may have changed meanwhile
        self._keep(self._watch(process, peer))
        if self._all.serving:
            with suppress(Fault):  # it has ended, and `_on_lost` has another one started
                await peer.channel.ask("serve")

    async def end(self, timeout_s: float) -> bool:
        """Drain the process, and end it; False where requests were cut, or it did not answer."""
        finished, peer, process = True, self.peer, self.process
        if peer is not None:
            try:
                async with asyncio.timeout(timeout_s + ENDED_S):
                    finished = bool(await peer.channel.ask("drain", timeout_s))
            except (TimeoutError, Fault) as error:
                why = str(error) or "it did not answer in time"
                log.warning("API process did not drain: its requests were cut", why=why)
                finished = False
            peer.channel.close()
        elif process is not None:
            _kill(process)
        for task in self._tasks:
            task.cancel()
        if process is not None:
            try:
                async with asyncio.timeout(ENDED_S):
                    await process.wait()
            except TimeoutError:
                _kill(process)
                await process.wait()
        return finished

    @property
    def _host(self) -> ApiHost:
        return self._all.host

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_lost(self, process: Process) -> None:
        was_ready, self.peer = self.peer is not None, None
        if self._all.ending:  # it sends its last spans, and `end` waits for that
            return
        _kill(process)
        if was_ready:
            self._keep(self._start_again(process))

    async def _start_again(self, process: Process) -> None:
        """Start another process until one listens: the address may still be the other one's."""
        status = await process.wait()
        log.error("API process ended: its requests were cut, another one is started", status=status)
        for pause_s in chain(PAUSES_S, repeat(PAUSES_S[-1])):
            await asyncio.sleep(pause_s)
            try:
                async with asyncio.timeout(self._all.start_s):
                    await self.start()
            except (Fault, OSError) as error:
                why = str(error) or f"it did not listen within {self._all.start_s:g} s"
                log.warning("API process does not start", why=why)
            else:
                log.info("API process started again", pid=self.process.pid if self.process else None)
                return

    async def _watch(self, process: Process, peer: ApiPeer) -> None:
        """Take over what the process counted, and end it when it does not answer."""
        while peer.channel.is_open:
            await asyncio.sleep(self._all.look_s)
            try:
                async with asyncio.timeout(self._all.hung_s):
                    await peer.collect()
            except TimeoutError:
                limit_s = self._all.hung_s
                log.warning("API process does not answer: it is killed", pid=process.pid, limit_s=limit_s)
                _kill(process)
                return
            except Fault:  # the process has ended
                return


def _kill(process: Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)  # asyncio's own may take the status of one that has ended
