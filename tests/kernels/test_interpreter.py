"""The fast operators of these tests change the interpreter's speed, and no result."""

import json
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.support import interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")


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


@triton.jit
def _whole(p_x, p_out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    x, y = tl.load(p_x + rows), tl.load(p_x + columns)
    wide = x.to(tl.int64) * 3000000000 - y
    found = x + y * 7 - (x - 2) * y + wide // (y * y + 1) + (x * y) // -3 + wide % 11 - (5 - x) // 2
    among = ((x < y) & (wide >= 0)) | (x == y) | ((y != 3) & (x <= -4)) | (wide > 40000000000)
    small = tl.load(p_x + N + columns - N, mask=among & (columns < tl.program_id(0) + 5), other=-1)
    tl.store(p_out + rows * N + columns, found + small + (x & 6) + (y | 9) + (tl.program_id(0) * N + 1))


@triton.jit
def _real(p_x, p_out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    x, y = tl.load(p_x + rows), tl.load(p_x + columns)
    half = (x * 3.0).to(tl.float16) * 0.1 + 7
    bits = (y * 1.7).to(tl.bfloat16) + 0.3
    among = (x < 0.5) | (y >= x) & (x != y)
    found = tl.where(among, (x - y) / (y * y + 0.1), 2.5 - x) + (x + rows) * 1e-3 + half + bits
    tl.store(p_out + rows * N + columns, found / 3)


@triton.jit
def _loaded(p_half, p_bits, p_out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    half = tl.load(p_half + i, mask=i < 5, other=-1.5).to(tl.float32)
    bits = tl.load(p_bits + i, mask=i < 3, other=2.5) * 1.0 + tl.load(p_bits + i, mask=i < 4, other=0.0)
    first = tl.load(p_bits).to(tl.float32) + tl.load(p_half + 1, mask=N > 4)
    found = half + bits.to(tl.float32) + first + 2 * (half * 3.7).to(tl.int32) + i.to(tl.int64).to(tl.float32)
    tl.store(p_out + i, found + tl.load(p_half + i, mask=(i < 2)[None, :].reshape(N), other=i))


def _bits() -> list[list[int]]:
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    half, outer = torch.zeros(6, 7, dtype=torch.float16), torch.zeros(4, 8)
    _softmax[(6,)](x, half, 7, 8)
    _outer[(1,)](x, outer, 4, 8)
    whole, real = torch.zeros(16, 16, dtype=torch.int64), torch.zeros(16, 16)
    _whole[(1,)](torch.arange(-5, 27, dtype=torch.int32), whole, 16)
    _real[(1,)](x, real, 16)
    loaded = torch.zeros(8)
    _loaded[(1,)](x.half(), x.bfloat16(), loaded, N=8)
    return [
        loaded.view(torch.int32).tolist(),
        half.view(torch.int16).flatten().tolist(),
        outer.view(torch.int32).flatten().tolist(),
        whole.flatten().tolist(),
        real.view(torch.int32).flatten().tolist(),
    ]


def test_kernels_compute_what_they_do_in_triton_s_own() -> None:
    """Reductions, casts, loads, broadcasts, masks, operators between tensors, scalars and numbers, overflows:
    the same bits in a process without it."""
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
