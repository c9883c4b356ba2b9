"""The reference of the kernels, in plain torch; on a host, experts are sorted and routed by it."""

import torch
from torch import Tensor

from inference_service.engine.kernels.experts.layout import ByExpert, Routed


def route(logits: Tensor, top_k: int, *, renormalised: bool) -> Routed:
    """Return the experts with the largest logits [T, E], by their probabilities.

    Renormalised they sum to 1, which is also the softmax of the chosen logits alone.
    """
    weights, ids = torch.topk(torch.softmax(logits.float(), dim=-1), top_k, dim=-1)
    return Routed(ids, weights / weights.sum(-1, keepdim=True) if renormalised else weights)


def by_expert(ids: Tensor, num_experts: int) -> ByExpert:
    """Sort the pairs of ids [T, k]; an expert's places are one tile, and without rows it has none."""
    flat, top_k = ids.flatten().long(), ids.shape[1]
    experts, order = torch.sort(flat, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=ids.device)
    ends = torch.cumsum(torch.bincount(flat, minlength=num_experts), 0)
    firsts = torch.cat([ends.new_zeros(1), ends[:-1]])
    tiles = torch.stack([torch.arange(num_experts, device=ids.device), firsts, ends], dim=1)
    return ByExpert(order // top_k, experts, places, tiles[ends > firsts], top_k)


def grouped(x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + b per pair [T, k, out], for x [T, k, in] and each pair's weight of [E, out, in]."""
    found = torch.einsum("tki,tkoi->tko", x.to(dtype), weight[ids.long()].to(dtype))
    return found if bias is None else found + bias[ids.long()].to(dtype)


def clamped(gate_up: Tensor, alpha: float, limit: float, dtype: torch.dtype) -> Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate) [..., I] of both side by side, clamped to the limit before."""
    gate, up = gate_up.to(dtype).chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def combine(y: Tensor, routed: Routed, dtype: torch.dtype) -> Tensor:
    """[T, out]: the weighted sum of each token's pairs [T, k, out]."""
    return (y.to(dtype) * routed.weights.to(dtype)[..., None]).sum(1)
