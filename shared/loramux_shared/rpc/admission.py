"""The keys in front of a gRPC server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from loramux_shared.access.keyring import Keyring, bearer
from loramux_shared.access.rights import ACCESS, Scope
from loramux_shared.faults import Fault, PermissionDenied, Unauthenticated
from loramux_shared.rpc.rules import CORE, Rules
from loramux_shared.rpc.status import abort


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
        ACCESS.set(access)  # each call is a task of its own, so nobody has to take this back
        return await continuation(details)


def _refusal(fault: Fault) -> grpc.RpcMethodHandler:
    # A handler of streams: it need not read the request, whatever the method is.
    async def refuse(_requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        await abort(context, fault)
        yield

    return grpc.stream_stream_rpc_method_handler(refuse)
