"""Names of our parts in Ray, and the variables by which its proxies find them."""

from typing import Final

from loramux_shared.bundle.names import names_of
from loramux_shared.routes import MODEL_HEADER

APP: Final = "loramux"
"""The application that serves a deployment, where a caller names none."""
BUILDER_APP: Final = "loramux-builder"
ENGINE: Final = "Engine"
BUILDER: Final = "Builder"
INGRESS: Final = "Ingress"
SERVICERS: Final = "loramux_ray.grpc_proxies.add_services"
"""The function that Ray's gRPC proxies call: `grpc_servicer_functions` of Serve's options."""
MODEL: Final = MODEL_HEADER
"""The header, or metadata, by which a request is routed where its body or message does not name a model."""
MIDDLEWARES: Final = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "loramux_ray.http_proxies.middlewares"}
"""The variable of a node by which Ray's HTTP proxies hand on to replicas themselves."""


def key_of(model: str, base: str) -> str:
    """Return by what the requests of a model go to the same replica; empty: they go to any, as the base's do.

    ``NAME@DIGEST``, ``BASE:NAME`` and ``NAME*SCALE`` go where NAME does, mixtures of the same names together.
    """
    names = {name.removeprefix(f"{base}:").partition("@")[0] for name in names_of(model)}
    return "+".join(sorted(names - {base}))
