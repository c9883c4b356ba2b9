"""The interpreter of these tests is quicker than Triton's own, and has its results."""

import json
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.kernels.place import COMPILED
from tests.support import interpreter

pytestmark = pytest.mark.skipif(COMPILED, reason="kernels are compiled where there is a GPU")


@triton.jit
def _softmax(p_x, p_out, N, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    x = tl.load(p_x + tl.program_id(0) * N + i, mask=i < N, other=-float("inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(p_out + tl.program_id(0) * N + i, (e / tl.sum(e, 0)).to(tl.float16), mask=i < N)


@triton.jit
def _outer(p_x, p_out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    found = tl.load(p_x + rows) * tl.load(p_x + columns) + (rows * 2147483647 + columns).to(tl.float32)
    tl.store(p_out + rows * COLUMNS + columns, found)


def _bits() -> list[list[int]]:
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    half, outer = torch.zeros(6, 7, dtype=torch.float16), torch.zeros(4, 8)
    _softmax[(6,)](x, half, 7, 8)
    _outer[(1,)](x, outer, 4, 8)
    return [half.view(torch.int16).flatten().tolist(), outer.view(torch.int32).flatten().tolist()]


def test_kernels_compute_what_they_do_in_triton_s_own() -> None:
    """Reductions, casts, loads, broadcasts, masks and overflows: the same bits in a process without it."""
    if not interpreter.quicken():
        pytest.skip(f"Triton {triton.__version__} is interpreted as it is")
    code = f"import json; from {__name__} import _bits; print(json.dumps(_bits()))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == _bits()


def test_mistakes_are_still_reported_and_leave_nothing_behind() -> None:
    """Shapes that are no powers of two or do not fit; the language is its own again after them."""
    before = tl.load, tl.core.load, tl.sum, tl.core.reduce
    x = torch.zeros(64)
    for sizes in ((3, 8), (4, 6)):
        with pytest.raises((InterpreterError, ValueError), match="power of 2"):
            _outer[(1,)](x, x, *sizes)
    assert before == (tl.load, tl.core.load, tl.sum, tl.core.reduce)
