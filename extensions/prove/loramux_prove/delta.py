"""A gated delta rule as https://arxiv.org/abs/2412.06464 writes it, in float32, one row after the other."""

import torch
from torch import Tensor
from torch.nn.functional import pad, sigmoid, silu, softplus

from loramux_shared.bases.layers import DeltaLayer


def taken_in(qkv: Tensor, taps: Tensor) -> Tensor:
    """Return silu of the convolution of each channel [T, channels], with taps [channels, width]."""
    width = taps.shape[1]
    windows = pad(qkv, (0, 0, width - 1, 0)).unfold(0, width, 1)  # [T, channels, width]
    return silu((windows * taps).sum(-1))


def recalled(spec: DeltaLayer, x: Tensor, beta: Tensor, left: Tensor) -> Tensor:
    """Return [T, value heads, value dim] of rows x [T, channels] that went through `taken_in`.

    beta and left [T, value heads] are how far each row's value is written, and what is left of the state.
    """
    keys = spec.key_heads * spec.key_dim
    queries, found = (x[:, part * keys : (part + 1) * keys].view(len(x), -1, spec.key_dim) for part in (0, 1))
    values = x[:, 2 * keys :].view(len(x), -1, spec.value_dim)
    owner = torch.arange(spec.value_heads) // (spec.value_heads // spec.key_heads)
    state = torch.zeros(spec.state_shape)
    outputs = []
    for row in range(len(x)):
        query, key = _unit(queries[row])[owner] / spec.key_dim**0.5, _unit(found[row])[owner]
        state = state * left[row, :, None, None]
        known = torch.einsum("hkv,hk->hv", state, key)
        change = (values[row] - known) * beta[row, :, None]
        state = state + torch.einsum("hk,hv->hkv", key, change)
        outputs.append(torch.einsum("hkv,hk->hv", state, query))
    return torch.stack(outputs)


def written(b: Tensor) -> Tensor:
    """Return how far each row's value is written."""
    return sigmoid(b)


def decay_of(a: Tensor, decay: Tensor, dt_bias: Tensor) -> Tensor:
    """Return what is left of the state at each row; decay is the logarithm of its speed."""
    return torch.exp(-decay.exp() * softplus(a + dt_bias))


def gated(x: Tensor, z: Tensor, norm: Tensor, eps: float) -> Tensor:
    """Norm each head of x [T, value heads, value dim], and gate it with z: [T, value heads * value dim]."""
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * norm
    return normed.flatten(1) * silu(z)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)
