"""The row-wise kernels against fp64: odd shapes, poisoned outputs, guarded inputs."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inference_service.engine.kernels.launch import Launch, intercepted, planned
from inference_service.engine.kernels.rounded import round_rows
from inference_service.engine.kernels.rows import Activation, activated, embed, gated, norm, reference, softcap
from tests.kernels.place import COMPILED

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS: list[Activation] = ["silu", "gelu_tanh", "gelu"]
TOLERANCE = {dtype: max(1e-5, 2 * torch.finfo(dtype).eps) for dtype in DTYPES}
"""Relative, of every element: two roundings, which are truncations in the interpreter."""
GUARD = 16
EPS = 1e-5


def guarded(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    """Fresh random rows with NaN columns beside them."""
    wide = torch.full((shape[0], shape[1] + GUARD), torch.nan)
    wide[:, : shape[1]] = torch.randn(shape) * scale
    return wide.to(device, dtype)[:, : shape[1]]


def poisoned(launch: Launch) -> None:
    """Enqueue a launch whose output is NaN before."""
    launch.arguments["p_out"].fill_(torch.nan)
    launch.enqueue()


def assert_close(got: Tensor, expected: Tensor, scale: Tensor | None = None) -> None:
    """Every element is as exact as its dtype allows, relative to ``scale`` or else to itself."""
    bound = TOLERANCE[got.dtype] * (expected if scale is None else scale).abs() + 1e-30
    worst = ((got.double() - expected).abs() / bound).max()
    assert worst <= 1, f"{worst:.1f} times the bound"


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [48, 63, 80, 96, 100, 1000, 5000])
def test_a_norm_adds_to_the_stream_and_norms_the_sum(
    dim: int, dtype: torch.dtype, offset: float, device: str
) -> None:
    """The stream is the rounded sum in place, and the output is the norm of that sum."""
    hidden, delta = (guarded(3, dim, dtype=dtype, device=device, scale=4) for _ in range(2))
    weight = torch.randn(dim).to(device, dtype)
    total = hidden.double() + delta.double()
    with intercepted(poisoned):
        out = norm(hidden, weight, eps=EPS, offset=offset, delta=delta)
    assert_close(hidden, total, scale=total.abs().clamp(min=1e-2))
    expected = reference.norm(hidden, weight, eps=EPS, offset=offset, dtype=torch.float64)
    assert_close(out, expected, scale=expected.abs().clamp(min=1e-2))
    assert out.dtype == dtype


def test_a_norm_is_of_the_sum_as_it_is_stored(device: str) -> None:
    """The norm does not see the part that the sum loses by rounding: in bfloat16, 256.99 is 256."""
    hidden = torch.full((1, 64), 256.0, dtype=torch.bfloat16, device=device)
    delta = torch.full_like(hidden, 0.99)
    delta[0, 0] = 0.0
    out = norm(hidden, torch.ones_like(hidden[0]), eps=0.0, delta=delta)
    assert hidden.unique().tolist() == [256.0]
    assert len(out.unique()) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_delta_may_be_normed_first(dtype: torch.dtype, device: str) -> None:
    """Gemma's post-norm, the addition and the next norm are one launch."""
    hidden, delta = (guarded(4, 80, dtype=dtype, device=device) for _ in range(2))
    first, second = (torch.randn(80).to(device, dtype) for _ in range(2))
    before, launches = hidden.double(), []
    with intercepted(lambda launch: (launches.append(launch), poisoned(launch))[1]):
        out = norm(hidden, second, eps=EPS, offset=1.0, delta=delta, delta_weight=first)
    normed = reference.norm(delta, first, eps=EPS, offset=1.0, dtype=torch.float64)
    assert len(launches) == 1
    assert_close(hidden, before + normed, scale=before.abs() + normed.abs())
    expected = reference.norm(hidden, second, eps=EPS, offset=1.0, dtype=torch.float64)
    assert_close(out, expected, scale=expected.abs().clamp(min=1e-2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [63, 1000])
def test_a_layer_norm_subtracts_the_mean_and_may_be_in_place(dim: int, dtype: torch.dtype, device: str) -> None:
    """Rows far from zero lose nothing to their mean, and the result may take their place."""
    hidden = guarded(3, dim, dtype=dtype, device=device) + 8
    weight, bias = torch.randn(2, dim).to(device, dtype)
    expected = torch.nn.functional.layer_norm(hidden.double(), (dim,), weight.double(), bias.double(), EPS)
    out = norm(hidden, weight, eps=EPS, centred=True, bias=bias, out=hidden)
    assert out is hidden
    assert_close(out, expected, scale=expected.abs().clamp(min=1.0))


@pytest.mark.parametrize("activation", ACTIVATIONS[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [63, 1100])
def test_gate_and_up_make_one_row(width: int, dtype: torch.dtype, activation: Activation, device: str) -> None:
    """Whole tiles and the end of a row are as exact as the dtype allows."""
    both = guarded(2, 2 * width, dtype=dtype, device=device, scale=2)
    with intercepted(poisoned):
        out = gated(both, activation)
    expected = reference.gated(both, activation, torch.float64)
    assert_close(out, expected, scale=expected.abs().clamp(min=1e-3))  # fp16 has subnormals below 6e-5


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, on purpose
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_survive_large_arguments(activation: Activation, device: str) -> None:
    """The answer is the gate or zero where exp overflows, never NaN."""
    gate = torch.tensor([[-1e30, -3e4, -90.0, 0.0, 90.0, 3e4, 1e30]], device=device)
    out = gated(torch.cat([gate, torch.ones_like(gate)], dim=1), activation)
    torch.testing.assert_close(out, gate.clamp(min=0.0), rtol=1e-6, atol=1e-30)
    near = torch.linspace(-4, 4, 99, device=device)[None]
    expected = reference.activated(near, activation, torch.float32)
    torch.testing.assert_close(activated(near, activation), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [48, 1100])
def test_rows_that_are_read_in_fp8_are_rounded_where_they_are_made(
    width: int, dtype: torch.dtype, fp8_device: str
) -> None:
    """Rounding them in a launch of its own gives the same bits, and is left out; but for a view of them."""
    hidden, delta = (guarded(3, width, dtype=dtype, device=fp8_device, scale=4) for _ in range(2))
    weight, bias = hidden[0].clone(), delta[0].clone()
    both = guarded(3, 2 * width, dtype=dtype, device=fp8_device)
    both[1] = 0

    def made(*, fp8: bool) -> list[Tensor]:
        normed = norm(hidden.clone(), weight, eps=EPS, delta=delta, bias=bias, offset=1.0, fp8=fp8)
        return [normed, gated(both, "silu", fp8=fp8), activated(hidden, "gelu", fp8=fp8)]

    for ours, apart in zip(made(fp8=True), made(fp8=False), strict=True):
        assert torch.equal(ours, apart)
        found, none = planned(round_rows, ours)
        assert not none
        assert len(planned(round_rows, ours[:])[1]) == 1
        for each, expected in zip(found, round_rows(apart), strict=True):
            assert torch.equal(each.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dim", [48, 1100])
def test_rows_of_embeddings_are_scaled(dim: int, index: torch.dtype, dtype: torch.dtype, device: str) -> None:
    """The scale is rounded to the dtype first: Gemma's 25.298 is 25.25 in bfloat16."""
    table = guarded(7, dim, dtype=dtype, device=device)
    tokens = torch.tensor([6, 0, 3, 0], dtype=index, device=device)
    with intercepted(poisoned):
        out = embed(tokens, table, 640**0.5)
        plain = embed(tokens, table)
    rounded = float(torch.tensor(640**0.5, dtype=dtype))
    assert_close(out, table[tokens.long()].double() * rounded)
    assert torch.equal(out.isnan(), torch.zeros_like(out, dtype=torch.bool))
    assert torch.equal(plain, table[tokens.long()])
    torch.testing.assert_close(
        reference.embed(tokens, table, 640**0.5, torch.float64), table[tokens.long()].double() * rounded
    )


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, on purpose
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_approach_the_cap(dtype: torch.dtype, device: str) -> None:
    """Small logits keep their digits, large ones become the cap, and memory beside them is unchanged."""
    logits = guarded(2, 1100, dtype=dtype, device=device, scale=40)
    logits[0, :100] *= 1e-3
    logits[0, 100:104] = torch.tensor([0.0, 6e4, -6e4, -torch.inf])
    before = logits.clone()
    softcap(logits, 30.0)
    assert_close(logits, reference.softcap(before, 30.0, torch.float64))
    assert logits[0, 101:104].tolist() == [30.0, -30.0, -30.0]
    assert logits.as_strided((2, 1100 + GUARD), (1100 + GUARD, 1))[:, 1100:].isnan().all()


X, W = torch.zeros(2, 64), torch.zeros(64)
REFUSALS: dict[str, Callable[[], object]] = {
    r"weight must be \(64,\), got \(63,\)": lambda: norm(X, W[1:], eps=EPS),
    "weight must be torch.float32, got torch.float16": lambda: norm(X, W.half(), eps=EPS),
    r"delta must be \(2, 64\)": lambda: norm(X, W, eps=EPS, delta=X[:1]),
    "delta_weight needs a delta": lambda: norm(X, W, eps=EPS, delta_weight=W),
    "hidden must be contiguous in its last": lambda: norm(X.T.contiguous().T, W, eps=EPS),
    "at most 16384 elements, got 20000": lambda: norm(torch.zeros(1, 20000), torch.zeros(20000), eps=EPS),
    "an even number of columns, got 63": lambda: gated(X[:, 1:], "silu"),
    "compute in": lambda: gated(X.double(), "silu"),
    "tokens must have 1 dimensions": lambda: embed(X.long(), X),
    "cap must be positive, got 0": lambda: softcap(X, 0),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_does_not_fit_is_refused(message: str) -> None:
    """A ValueError names the tensor, the expected shape or type, and the actual one."""
    if COMPILED:
        pytest.skip("the tensors are on the CPU")
    with pytest.raises(ValueError, match=message):
        REFUSALS[message]()


def test_no_package_needs_triton() -> None:
    """CPU machines import all packages, these and the others, and use the references without Triton."""
    code = (
        "import sys; sys.modules['triton'] = None; "
        "from inference_service.engine.kernels.rows import reference as rows; "
        "from inference_service.engine.kernels.sampling import reference as sampling; "
        "from inference_service.engine.kernels.sgmv import reference as sgmv; "
        "from inference_service.engine.kernels import attention"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
