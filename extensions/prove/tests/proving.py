"""Proofs computed in the process of the tests, where that a build starts another is not the point."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from builder_service.pipeline.progress import Progress
from loramux_prove import building
from loramux_prove.__main__ import prove


@contextmanager
def proved_here() -> Iterator[None]:
    """Let builds compute their proofs here: a process takes longer to import torch than to prove."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "_run", _answer)
        yield


def _answer(request: dict[str, Any], _: Progress) -> dict[str, Any]:
    proofs = prove(Path(request["base"]), request["adapters"], request["max_seq_len"])
    return {"proofs": json.loads(json.dumps(proofs))}
