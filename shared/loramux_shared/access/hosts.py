"""The names of a server without keys: what a browser sends for a page of another site is refused.

Such a page may have its own name resolve to this machine (DNS rebinding), and its requests are then of the same
origin: only their Host tells them apart.
"""

import ipaddress
import re
from collections.abc import Callable, Collection
from typing import Final
from urllib.parse import urlsplit

from loramux_shared.access.asgi import App, Message, Receive, Send
from loramux_shared.faults import Fault, HostRefused
from loramux_shared.routes import HEALTH, PING

_PORT: Final = re.compile(r":\d*$")


def is_loopback(host: str) -> bool:
    """True where a host is this machine's loopback by its name or address, which no DNS server says."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def require_own(names: Collection[str], header: str, value: str) -> None:
    """Raise HostRefused where the Host or Origin of a request is neither loopback's nor one of these names."""
    authority = (value if header == "host" else urlsplit(value).netloc).lower()
    host = _PORT.sub("", authority)
    if not value or is_loopback(host) or {authority, host} & {*names}:
        return
    raise HostRefused(
        f"expected the {header.capitalize()} of the request to be localhost, 127.0.0.1, [::1] or a name of "
        f"LORAMUX_HTTP_HOSTS, found {value[:100]!r}: without keys, pages of other sites must not reach this "
        "server. Use http://localhost, or add the name to LORAMUX_HTTP_HOSTS if it is the server's own."
    )


class HostMiddleware:
    """Refuses requests to other names, and from pages of other sites, before their bodies are read.

    Health is told to all names: proxies ask for it by names of their own.
    """

    def __init__(self, app: App, names: Collection[str], refusal: Callable[[Message, Fault], App]) -> None:
        """Wrap an ASGI application; names are allowed beside loopback's, refusal sends a fault."""
        self._app = app
        self._names = names
        self._refusal = refusal

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        is_health = scope.get("path") in (HEALTH.path, PING.path)
        try:
            for name, value in () if is_health else scope.get("headers", ()):
                if name in (b"host", b"origin"):
                    require_own(self._names, name.decode(), value.decode("latin-1"))
        except HostRefused as fault:
            await self._refusal(scope, fault)(scope, receive, send)
            return
        await self._app(scope, receive, send)
