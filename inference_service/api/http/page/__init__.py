"""The page at ``/``: static files beside this module, and the headers that go with them."""

from importlib.resources import files
from typing import Final

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.api.http.endpoint import Endpoint, Handler
from inference_service.api.requests.service import GenerationService
from loramux_shared.routes import Route

MEDIA_TYPES: Final = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}
HEADERS: Final = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""Nothing from elsewhere, nothing inline, no frame around it: what a model writes can never run."""


def page_endpoints() -> list[Endpoint]:
    """Return what answers each path of the page; the files are read here, once."""
    found: list[Endpoint] = []
    for file in sorted(files(__name__).iterdir(), key=lambda each: each.name):
        kind = file.name.rpartition(".")[2]
        if kind in MEDIA_TYPES:
            path = "/" if file.name == "index.html" else f"/page/{file.name}"
            show = _handler(file.read_bytes(), f"{MEDIA_TYPES[kind]}; charset=utf-8")
            found.append(Endpoint(Route("GET", path, None), show, text=MEDIA_TYPES[kind]))
    return found


def _handler(content: bytes, content_type: str) -> Handler:
    async def show(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
        """Show a file of the page."""
        return Response(content, headers=HEADERS | {"content-type": content_type})

    return show
