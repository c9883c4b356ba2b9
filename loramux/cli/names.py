"""Names of models: the near ones of a wrong one, and those that complete a beginning."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import typer

from loramux.client import INFERENCE, Client
from loramux_shared.faults import Fault, ModelNotFound
from loramux_shared.mixtures import BASE, names_of
from loramux_shared.wording import listed

COMPLETION_S = 1.0
"""Bound of a completion, since a person waits after TAB; a slower server is not asked further."""


def unserved(model: str, served: Sequence[str]) -> list[str]:
    """Return what is not served of a model, or of the parts of ``NAME*SCALE+NAME``."""
    if model in served:
        return []
    return [name for name in names_of(model) if name not in (*served, BASE)]


def no_such_model(name: str, served: Sequence[str]) -> ModelNotFound:
    """Return the failure for a name that is not served, with the nearest that is."""
    near = difflib.get_close_matches(name, served, n=1, cutoff=0.7)
    meant = f" Did you mean {near[0]}?" if near else ""
    return ModelNotFound(f"no model {name!r}; served are {listed(served)}.{meant}")


def complete_model(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the served names that begin so; none when no server answers at once."""
    try:
        with Client(inference=ctx.params.get("grpc") or INFERENCE, timeout_s=COMPLETION_S) as client:
            return [each.name for each in client.models() if each.name.startswith(incomplete)]
    except Fault:
        return []
