"""Mixtures of experts: the reference against transformers, the kernels against the reference."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from inference_service.engine.backends.deterministic import DeterministicOperations
from inference_service.engine.kernels import experts
from inference_service.engine.kernels.cpu.ops import CpuOps
from inference_service.engine.kernels.experts.tuning import TILE, Load, load_of
from inference_service.engine.kernels.launch import Launch, intercepted

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Relative tolerance of the norm of the difference."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def poisoned(launch: Launch) -> None:
    """Enqueue a launch whose outputs hold nonsense before."""
    for name in WRITTEN.get(launch.kernel.fn.__name__, "p_out").split():
        tensor = launch.arguments[name]
        tensor.fill_(torch.nan if tensor.is_floating_point() else 1 << 20)
    launch.enqueue()


WRITTEN = {"route_kernel": "p_ids p_weights", "sort_kernel": "p_tokens p_experts p_places p_tiles"}


@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (5, 5), (60, 4), (128, 8)])
def test_routes_are_those_of_the_reference(
    num_experts: int, top_k: int, renormalised: bool, device: str
) -> None:
    """The same experts, the largest first, with weights that are exact in float32."""
    logits = (torch.randn(5, num_experts + 3) * 4).to(device)[:, :num_experts]
    with intercepted(poisoned):
        found = experts.route(logits, top_k, renormalised=renormalised)
    expected = experts.reference.route(logits, top_k, renormalised=renormalised)
    assert found.ids.tolist() == expected.ids.tolist()
    torch.testing.assert_close(found.weights, expected.weights, atol=1e-7, rtol=2e-6)


def test_a_row_of_nonsense_is_routed_to_experts_that_there_are(device: str) -> None:
    """A padding row may hold anything, and is routed to an expert that exists."""
    logits = torch.randn(3, 6, device=device)
    logits[0], logits[1, 2:] = torch.nan, float("-inf")
    found = experts.route(logits, 4, renormalised=True)
    assert found.ids.min() >= 0
    assert found.ids.max() < 6
    assert found.ids[2].tolist() == experts.reference.route(logits, 4, renormalised=True).ids[2].tolist()


def ids_of(tokens: int, num_experts: int, top_k: int, device: str) -> Tensor:
    """Experts of tokens, some of which nothing uses."""
    weight = torch.rand(num_experts) * (torch.rand(num_experts) > 0.3) + 1e-9
    return torch.multinomial(weight.expand(tokens, -1), top_k).to(device, torch.int32)


@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), [(1, 1, 1), (3, 128, 8), (50, 7, 3), (700, 5, 2)])
def test_pairs_are_sorted_by_expert_and_stay_in_order(
    tokens: int, num_experts: int, top_k: int, device: str
) -> None:
    """Each pair has one place; tiles hold the places of one expert each, all of them, and never too many."""
    ids = ids_of(tokens, num_experts, top_k, device)
    with intercepted(poisoned):
        found = experts.by_expert(ids, num_experts)
    order = torch.sort(ids.flatten(), stable=True).indices
    assert found.tokens.tolist() == (order // top_k).tolist()
    assert found.places[order].tolist() == list(range(ids.numel()))
    assert found.experts.tolist() == ids.flatten()[order].tolist()
    covered, tile = [], TILE[load_of(ids.numel(), num_experts)]
    for expert, first, end in found.tiles.tolist():
        assert 0 <= end - first <= tile
        covered += range(first, end)
        assert {int(found.experts[place]) for place in range(first, end)} <= {expert}
    assert covered == list(range(ids.numel()))


def made(
    tokens: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, experts.Routed, experts.ByExpert]:
    """x [T, 40], weight [6, 70, 40], bias, and pairs of 6 experts of which each token has 2."""
    x, weight, bias = (torch.randn(shape).to(device, dtype) for shape in ((tokens, 40), (6, 70, 40), (6, 70)))
    ids = ids_of(tokens, 6, 2, device)
    routed = experts.Routed(ids, torch.rand(tokens, 2, device=device))
    return x, weight, bias, routed, experts.by_expert(ids, 6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_a_grouped_product_equals_one_product_per_pair(tokens: int, dtype: torch.dtype, device: str) -> None:
    """Few and many tokens agree, with x by token and by place, with and without a bias."""
    x, weight, bias, routed, pairs = made(tokens, dtype, device)
    assert load_of(2 * tokens, 6) is (Load.MANY if tokens == 70 else Load.FEW)
    each = x[:, None].expand(-1, 2, -1)
    for found, with_bias in (
        (experts.grouped(x, weight, pairs, bias, of_tokens=True), bias),
        (experts.grouped(x[pairs.tokens.long()], weight, pairs), None),
    ):
        expected = experts.reference.grouped(each, routed.ids, weight, with_bias, torch.float64).flatten(0, 1)
        assert _error(found[pairs.places.long()], expected) < TOLERANCE[dtype]


def test_weights_of_an_expert_beyond_32_bits_are_right(device: str) -> None:
    """The weights of an expert may begin behind the first 2**31 elements."""
    far = 2**31 // 256 + 1
    weight = torch.empty(far + 1, 16, 16, dtype=torch.float16, device=device)
    weight[far] = torch.randn(16, 16)
    x, places = torch.randn(2, 16).to(weight), torch.arange(2, dtype=torch.int32, device=device)
    pairs = experts.ByExpert(places, places, places, places.new_tensor([[far, 0, 2]]), 1)
    assert _error(experts.grouped(x, weight, pairs), x.double() @ weight[far].double().T) <= TOLERANCE[x.dtype]


def test_a_token_gives_the_same_bits_in_every_batch(device: str) -> None:
    """A token's result is the same whatever other tokens its experts have, in its tile or in others."""
    x, weight, bias, routed, pairs = made(9, torch.float32, device)
    if device == "cpu":  # numpy's sums of a row depend on where it lies, but for small integers
        x, weight, bias = ((4 * each).round() for each in (x, weight, bias))
    together = experts.grouped(x, weight, pairs, bias, of_tokens=True)[pairs.places.long()].view(9, 2, -1)
    for token in (0, 4, 8):
        alone = experts.by_expert(routed.ids[token : token + 1], 6)
        found = experts.grouped(x[token : token + 1], weight, alone, bias, of_tokens=True)[alone.places.long()]
        assert torch.equal(found, together[token])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs_are_combined_by_their_weights(dtype: torch.dtype, device: str) -> None:
    """Pairs are combined in float32, with one rounding, from any places."""
    _, _, _, routed, pairs = made(9, dtype, device)
    y = torch.randn(18, 600).to(device, dtype)
    with intercepted(poisoned):
        found = experts.combine(y, routed, pairs)
    expected = experts.reference.combine(y[pairs.places.long()].view(9, 2, -1), routed, torch.float64)
    assert _error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_are_clamped(dtype: torch.dtype, device: str) -> None:
    """Gates are clamped from above, and up from both sides; far gates neither overflow nor become NaN."""
    both = (torch.randn(3, 2 * 520) * 8).to(device, dtype)
    both[0, :4] = torch.tensor([60.0, -60.0, -2000.0, 2000.0], dtype=dtype)
    with intercepted(poisoned):
        found = experts.clamped(both, 1.702, 7.0)
    assert _error(found, experts.reference.clamped(both, 1.702, 7.0, torch.float64)) < TOLERANCE[dtype]


def test_deterministic_operations_of_experts_see_one_row(compiled: ctypes.CDLL) -> None:
    """A row has the same bits in every batch; torch computes the last few values of all another way."""
    ops = DeterministicOperations(CpuOps(compiled, torch.float32))
    logits, gate_up, gate, x = (torch.randn(150, size) * 3 for size in (60, 2 * 21, 1, 21))
    together = ops.route(logits, 4, renormalised=False)
    clamped_rows, gated_rows = ops.clamped(gate_up, 1.702, 7.0), ops.add_gated(x.clone(), x, gate)
    for row in range(150):
        alone = slice(row, row + 1)
        routed = ops.route(logits[alone], 4, renormalised=False)
        assert torch.equal(routed.ids[0], together.ids[row])
        assert torch.equal(routed.weights[0], together.weights[row])
        assert torch.equal(ops.clamped(gate_up[alone], 1.702, 7.0)[0], clamped_rows[row])
        assert torch.equal(ops.add_gated(x[alone].clone(), x[alone], gate[alone])[0], gated_rows[row])


def test_what_does_not_fit_is_refused(device: str) -> None:
    """A shape that does not fit is refused by name, before anything is launched."""
    x, weight, bias, routed, pairs = made(9, torch.float32, device)
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: experts.route(x, 41, renormalised=True), "top_k"),
        (lambda: experts.route(x.T, 2, renormalised=True), "contiguous"),
        (lambda: experts.by_expert(routed.ids.long(), 6), "int32"),
        (lambda: experts.by_expert(routed.ids, 2000), "experts"),
        (lambda: experts.grouped(x, weight, pairs), "18 rows"),
        (lambda: experts.grouped(x, weight[:, :, :39], pairs, of_tokens=True), "weight"),
        (lambda: experts.grouped(x, weight, pairs, bias[:, 1:], of_tokens=True), "bias"),
        (lambda: experts.grouped(x[:8], weight, pairs, of_tokens=True), "9 rows"),
        (lambda: experts.clamped(x[:, 1:], 1.0, 1.0), "even"),
        (lambda: experts.combine(x, routed, pairs), "rows"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
