"""SGMV's launcher: which changes a captured launch survives, and which are refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from inference_service.kernels.sgmv import Slices
from tests.kernels.sgmv_case import Case, make_case

RANKS = [(4, 8), (12, 0), (16, 16), (8, 5), (4, 4)]
REFUSALS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "the same K": lambda case: {"x": case.x[:, 1:]},
    "x must be contiguous in its last": lambda case: {"x": case.x.T.contiguous().T},
    "x must have 2 dimensions": lambda case: {"x": case.x[:, None]},
    "weights must be torch.float16": lambda case: {"out": case.out.half()},
    "compute in": lambda case: {"out": case.out.double()},
    "out must have 97 columns": lambda case: {"out": case.out[:, :96]},
    "workspace must hold": lambda case: {"workspace": case.workspace[1:]},
    "workspace must be torch.float32": lambda case: {"workspace": case.workspace.half()},
    "segments have 5 slots, table only 4": lambda case: {
        "group": replace(case.group, table=case.group.table[:4])
    },
    "table must be int32 or int64": lambda case: {"group": replace(case.group, table=case.group.table.float())},
    "must be on meta": lambda case: {"x": case.x.to("meta")},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_does_not_fit_is_refused(message: str, device: str) -> None:
    """A ValueError names the tensor, the expected shape or type, and the actual one."""
    case = make_case([0] * 20, RANKS, 100, (64, 33), device=device)
    with pytest.raises(ValueError, match=message):
        replace(case, **REFUSALS[message](case)).run()


def test_slices_must_not_overlap() -> None:
    """Two slices that share a column would race."""
    assert Slices.consecutive(192, 64, 64) == Slices((0, 192, 256), (192, 64, 64))
    with pytest.raises(ValueError, match="must not overlap"):
        Slices((0, 8), (16, 16))
