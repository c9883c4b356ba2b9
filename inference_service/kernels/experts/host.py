"""The same on a host, in plain torch: an expert's places are one tile, however many they are."""

from __future__ import annotations

import torch
from torch import Tensor

from inference_service.kernels.experts.layout import ByExpert


def by_expert(ids: Tensor, num_experts: int) -> ByExpert:
    """Sort the pairs of ids [T, k]; experts without rows have no tile."""
    flat, top_k = ids.flatten().long(), ids.shape[1]
    experts, order = torch.sort(flat, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=ids.device)
    ends = torch.cumsum(torch.bincount(flat, minlength=num_experts), 0)
    firsts = torch.cat([ends.new_zeros(1), ends[:-1]])
    tiles = torch.stack([torch.arange(num_experts, device=ids.device), firsts, ends], dim=1)
    return ByExpert(order // top_k, experts, places, tiles[ends > firsts], top_k)
