"""Clients of HTTP applications, without a socket."""

from typing import Any

import httpx
from starlette.types import ASGIApp


def web_client(app: ASGIApp, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api", **options)
