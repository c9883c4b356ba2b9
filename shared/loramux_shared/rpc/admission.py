"""The keys in front of a gRPC server, and the rules of its services: the scope that a call needs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from loramux_shared import routes
from loramux_shared.access.keyring import Keyring, bearer
from loramux_shared.access.keys import ACCESS, Scope
from loramux_shared.faults import Fault, PermissionDenied, Unauthenticated
from loramux_shared.rpc.status import abort


@dataclass(frozen=True)
class Rules:
    """The rules of some services."""

    scopes: Mapping[str, Scope | None] = field(default_factory=dict)
    """Scopes of keys by service, or by method (``package.Service/Method``), which comes first; None: any key.

    A service that is not named needs admin.
    """
    keyless: tuple[str, ...] = ()
    """Prefixes of the paths of calls that need no key."""
    untraced: frozenset[str] = frozenset()
    """Paths of calls that make no spans."""

    def __add__(self, other: Rules) -> Rules:
        """Return the rules of the services of both."""
        return Rules(
            {**self.scopes, **other.scopes}, self.keyless + other.keyless, self.untraced | other.untraced
        )


CORE: Final = Rules(routes.SCOPES, keyless=("/grpc.health.v1.Health/",))


class AdmissionInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types here
    """Refuses a call whose key is missing, unknown or of another scope, before its request is read."""

    def __init__(self, keyring: Keyring, rules: Rules = CORE) -> None:
        self._keyring = keyring
        self._rules = rules

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Let a call in, with the rights of its key, or end it."""
        if details.method.startswith(self._rules.keyless):
            return await continuation(details)
        method = details.method.removeprefix("/")
        scopes = self._rules.scopes
        scope = scopes.get(method, scopes.get(method.rpartition("/")[0], Scope.ADMIN))
        headers = [value for name, value in details.invocation_metadata if name == "authorization"]
        try:
            access = self._keyring.authorize(bearer(headers), scope)
        except (Unauthenticated, PermissionDenied) as fault:
            return _refusal(fault)
        ACCESS.set(access)  # a call is a task, so the variable needs no reset
        return await continuation(details)


def _refusal(fault: Fault) -> grpc.RpcMethodHandler:
    # A handler of streams: it need not read the request, whatever the method is.
    async def refuse(_requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        await abort(context, fault)
        yield

    return grpc.stream_stream_rpc_method_handler(refuse)
