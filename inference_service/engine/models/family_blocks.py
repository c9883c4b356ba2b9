"""The blocks of latent and tempered attention, of MLPs without a gate and of routers in groups."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from inference_service.engine.backends.base import LayerHeads
from inference_service.engine.backends.operations import Operations
from inference_service.engine.kernels.experts import Routed
from inference_service.engine.layers.norm import RMSNorm
from inference_service.engine.models.blocks import (
    AttentionBlock,
    Blocks,
    CacheSize,
    LayerCache,
    MixerBlock,
    Mlp,
    MlpBlock,
    Step,
)
from inference_service.engine.models.experts import Experts
from inference_service.engine.models.reader import LayerReader
from loramux_shared.bases.family_layers import LatentLayer, PlainLayer, RoutedLayer, TemperedLayer
from loramux_shared.faults import SettingsInvalid

LATENT_EPS = 1e-6
"""Epsilon of the norms of what queries, keys and values are made of, whatever the config has for others."""


class LatentBlock(MixerBlock):
    """Attends over a cache of whole keys and values, each made of its token's few numbers once."""

    def __init__(self, reader: LayerReader, spec: LatentLayer) -> None:
        """Read the weights."""
        config, own = reader.config, "self_attn."
        self._index, self._spec = reader.index, spec
        self._rope = config.ropes.index(spec.rope)
        self._window = config.windows.index(spec.attention.window)
        self._groups = {shape.modules[0]: shape.name for shape in reader.groups}
        self._q_b = self._q_norm = None
        self._first = "attn_q" if spec.q_rank is None else "latent_q_a"
        name = f"{own}{'q_proj' if spec.q_rank is None else 'q_a_proj'}"
        self._in = reader.linear(self._first, (name, f"{own}kv_a_proj_with_mqa"))
        if spec.q_rank is not None:
            self._q_norm = _norm(reader, f"{own}q_a_layernorm", spec.q_rank)
            self._q_b = reader.linear("latent_q_b", (f"{own}q_b_proj",))
        self._kv_norm = _norm(reader, f"{own}kv_a_layernorm", spec.kv_rank)
        self._kv_b = reader.linear("latent_kv_b", (f"{own}kv_b_proj",))
        self._o = reader.linear("attn_dense", (config.names.o,))

    def new_cache(self, operations: Operations, size: CacheSize) -> LayerCache:
        """Return an empty cache of keys and values, both as wide as keys."""
        return operations.new_cache(size.rows[self._window], self._spec.heads)

    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return [T, hidden] for x [T, hidden]."""
        spec, rows = self._spec, len(x)
        rotary, plain = spec.rope.dim, spec.head_dim - spec.rope.dim
        fused = step.linear(self._in, x, self._index, self._groups[self._first])
        widths = [fused.shape[1] - spec.kv_rank - rotary, spec.kv_rank, rotary]
        queries, latent, key = torch.split(fused, widths, dim=1)
        if self._q_b is not None and self._q_norm is not None:
            queries = step.operations.norm(queries.contiguous(), self._q_norm, None, None)
            queries = step.linear(self._q_b, queries, self._index, self._groups["latent_q_b"])
        queries = queries.view(rows, -1, spec.head_dim)
        latent = step.operations.norm(latent.contiguous(), self._kv_norm, None, None)
        expanded = step.linear(self._kv_b, latent, self._index, self._groups["latent_kv_b"])
        expanded = expanded.view(rows, queries.shape[1], -1)
        keys, values = expanded[..., :plain], expanded[..., plain:]
        key = self._halves(key)[:, None].expand(-1, queries.shape[1], -1)
        heads = torch.cat(
            [
                # rotated dimensions first, as attention takes them
                torch.cat([self._halves(queries[..., plain:]), queries[..., :plain]], dim=2),
                torch.cat([key, keys], dim=2),
                pad(values, (0, spec.head_dim - spec.value_dim)),
            ],
            dim=1,
        )
        cached_keys, cached_values, *eight_bits = step.cache.layers[self._index]
        scales = eight_bits[0] if eight_bits else None
        rotation = step.rotations[self._rope]
        layer = LayerHeads(heads, rotation, cached_keys, cached_values, spec.attention, scales=scales)
        seen = step.attention(layer)
        seen = seen.view(rows, -1, spec.head_dim)[..., : spec.value_dim].flatten(1)
        return step.linear(self._o, seen, self._index, self._groups["attn_dense"])

    def _halves(self, x: Tensor) -> Tensor:
        """Return rotated dimensions [..., d] with the first of each pair before the second ones."""
        return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1) if self._spec.rope.neighbours else x


def _norm(reader: LayerReader, name: str, width: int) -> RMSNorm:
    return RMSNorm(reader.norm(name, width).weight, LATENT_EPS)


class TemperedBlock(AttentionBlock):
    """Norms the heads of queries and keys by their size, before they are rotated, or scales queries."""

    def __init__(self, reader: LayerReader, spec: TemperedLayer) -> None:
        """Read the weights."""
        super().__init__(reader, spec)
        window = spec.attention.window
        if spec.attention.tumbling and not reader.operations.tumbles:
            raise SettingsInvalid(
                f"{reader.config.architecture}: layers attend in chunks of {window} positions, which no kernel "
                f"of a GPU knows. Set build.max_seq_len to at most {window}, or serve it on a CPU."
            )
        self._tempered = spec.tempered
        if spec.normed:
            like = reader.norm(reader.config.names.input_norm or "")
            shape = spec.num_heads + spec.num_kv_heads, spec.head_dim
            self._head_norm = RMSNorm(like.weight.new_ones(shape), like.eps)

    def _prepared(self, step: Step, qkv: Tensor) -> Tensor:
        return super()._prepared(step, qkv) if self._tempered else qkv


class PlainBlock(MlpBlock):
    """max(0, up x)^2 or xIELU(up x), and down again."""

    def __init__(self, reader: LayerReader, spec: PlainLayer) -> None:
        """Read the weights."""
        names, bias = reader.config.names, reader.config.mlp_bias
        super().__init__(reader, ("mlp_h_to_4h", names.gate_up), ("mlp_4h_to_h", (names.down,)), bias=bias)
        self._curve = Curve.of_layer(reader) if spec.activation == "xielu" else None

    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return [T, hidden] for x [T, hidden]."""
        up = step.linear(self._gate_up, x, self._index, self._up_group)
        activated = up.relu().square() if self._curve is None else self._curve(up)
        return step.linear(self._down, activated, self._index, self._down_group)


class Curve(NamedTuple):
    """The xIELU of a layer, https://arxiv.org/abs/2411.13010; all are scalars."""

    above: Tensor
    below: Tensor
    slope: Tensor
    least: Tensor

    @classmethod
    def of_layer(cls, reader: LayerReader) -> Curve:
        """Read that of a layer."""
        at, rounded = "mlp.act_fn.", reader.reader.rounded
        above, below = (rounded(reader.get(f"{at}{name}", (1,))) for name in ("alpha_p", "alpha_n"))
        slope, least = (rounded(reader.get(f"{at}{name}", ())) for name in ("beta", "eps"))
        return cls(softplus(above), slope + softplus(below), slope, least)

    def __call__(self, x: Tensor) -> Tensor:
        """Return a number of each of x."""
        negative = (torch.expm1(torch.minimum(x, self.least)) - x) * self.below
        return torch.where(x > 0, self.above * x * x, negative) + self.slope * x


class RoutedBlock:
    """A router in float32, its experts, and perhaps an MLP of those that all rows have."""

    def __init__(self, reader: LayerReader, spec: RoutedLayer) -> None:
        """Read the weights."""
        names = reader.config.names
        self._spec, exact = spec, torch.float32
        shape = spec.num, reader.config.dims.hidden
        self._router = reader.get(f"{names.router}.weight", shape, exact).t().contiguous()
        self._correction = None
        if spec.correction is not None:
            self._correction = reader.get(spec.correction, (1, spec.num), exact)[0]
        elif spec.corrected:
            self._correction = reader.get(f"{names.router}.e_score_correction_bias", (spec.num,), exact)
        self._experts = Experts(reader, spec)
        self._shared = None
        if spec.shared is not None:
            both = "shared_gate", (f"{names.shared_expert}.gate_proj", f"{names.shared_expert}.up_proj")
            down = "shared_4h_to_h", (f"{names.shared_expert}.down_proj",)
            self._shared = MlpBlock(reader, both, down, bias=False)

    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return [T, hidden] for x [T, hidden]."""
        rows = x.float()
        each = torch.split(rows, 1) if step.operations.by_row else (rows,)
        routed = route(torch.cat([part @ self._router for part in each]), self._spec, self._correction)
        out = self._scaled(step, x, routed) if self._spec.scales_inputs else self._experts(step, x, routed)
        return out if self._shared is None else out.add_(self._shared(step, x))

    def _scaled(self, step: Step, x: Tensor, routed: Routed) -> Tensor:
        """Return what experts make of x [T, hidden], each of its input times its weight."""
        pairs = zip(torch.split(routed.ids, 1, dim=1), torch.split(routed.weights, 1, dim=1), strict=True)
        first, *others = [
            self._experts(step, x * weights.to(x.dtype), Routed(ids.contiguous(), torch.ones_like(weights)))
            for ids, weights in pairs
        ]
        for other in others:
            first += other
        return first


def route(logits: Tensor, spec: RoutedLayer, correction: Tensor | None) -> Routed:
    """Return the experts of each row of logits [T, E], chosen with a correction [E], and their weights."""
    if spec.scores == "sparsemixer":
        return sparsemixer(logits, spec.jitter)
    scores = logits.sigmoid() if spec.scores == "sigmoid" else logits.softmax(dim=-1)
    chosen = scores if correction is None else scores + correction
    if spec.scales_inputs:
        chosen = logits  # of which no two become the same where a sigmoid is nearly 1
    if spec.num_groups > 1:
        chosen = best_groups(chosen, spec.num_groups, spec.top_groups, 2 if spec.corrected else 1)
    ids = chosen.topk(spec.top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if spec.renormalised:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return Routed(ids.int(), weights * spec.scaling)


def best_groups(scores: Tensor, num: int, top: int, counted: int) -> Tensor:
    """Return scores [T, E] with -inf outside of the best groups, by the sum of some of their best experts."""
    of_groups = scores.view(len(scores), num, -1)
    best = of_groups.topk(counted, dim=-1).values.sum(dim=-1).topk(top, dim=-1).indices
    left_out = torch.ones_like(of_groups[..., 0], dtype=torch.bool).scatter_(1, best, False)
    return of_groups.masked_fill(left_out[..., None], float("-inf")).view_as(scores)


def sparsemixer(logits: Tensor, jitter: float) -> Routed:
    """Return two experts of each row of logits [T, E], each weighed among those that come close to it."""
    left, ids, weights = logits, [], []
    for _ in range(2):
        best, chosen = left.max(dim=-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * jitter
        weights.append(left.masked_fill(far, float("-inf")).softmax(dim=-1).gather(1, chosen))
        ids.append(chosen)
        left = left.scatter(1, chosen, float("-inf"))
    return Routed(torch.cat(ids, dim=1).int(), torch.cat(weights, dim=1))


MIXERS: Final[Blocks[MixerBlock]] = {LatentLayer: LatentBlock, TemperedLayer: TemperedBlock}
MLPS: Final[Blocks[Mlp]] = {PlainLayer: PlainBlock, RoutedLayer: RoutedBlock}
