"""Gated MLPs of which a router chooses a few for every row; they read weights as all blocks do."""

from collections.abc import Iterable

import torch
from torch import Tensor

from inference_service.engine.backends.operations import Grouped
from inference_service.engine.kernels.experts import Routed
from inference_service.engine.layers.norm import RMSNorm
from inference_service.engine.models.blocks import MlpBlock, Step
from inference_service.engine.models.reader import LayerReader
from loramux_shared.bases.groups import EXPERTS_DOWN, EXPERTS_GATE_UP, GroupShape, name_of_all
from loramux_shared.bases.layers import ExpertsLayer


class Experts:
    """All experts of a layer, and what they make of rows that were routed to them."""

    def __init__(self, reader: LayerReader, spec: ExpertsLayer) -> None:
        """Read the weights."""
        self._index, self._spec = reader.index, spec
        self._activation = reader.config.activation
        shapes = [group for group in reader.groups if group.expert is not None]
        of_up, of_down = shapes[0::2], shapes[1::2]
        self._up_group, self._down_group = name_of_all(of_up[0].name), name_of_all(of_down[0].name)
        self._gate_up = _grouped(reader, spec, of_up, EXPERTS_GATE_UP)
        self._down = _grouped(reader, spec, of_down, EXPERTS_DOWN)

    def __call__(self, step: Step, x: Tensor, routed: Routed) -> Tensor:
        """Return [T, hidden] for x [T, hidden]."""
        ops, gate, pairs = step.operations, self._spec.gate, step.operations.by_expert(routed, self._spec.num)
        of_up = self._index, self._up_group, pairs
        if gate is None:
            gate_up, update = step.apply_experts_deferring_lora(self._gate_up, x, *of_up)
            gated = ops.gated(gate_up, self._activation, update)
        else:
            gate_up = step.experts(self._gate_up, x, *of_up, of_tokens=True)
            gated = ops.clamped(gate_up, gate.alpha, gate.limit)
        return ops.combine(step.experts(self._down, gated, self._index, self._down_group, pairs), routed, pairs)


class ExpertsBlock:
    """A router and its experts, and perhaps an expert that all rows have."""

    def __init__(self, reader: LayerReader, spec: ExpertsLayer) -> None:
        """Read the weights."""
        config, self._spec = reader.config, spec
        router, rounded = config.names.router, reader.reader.rounded
        weight = rounded(reader.get(f"{router}.weight", (spec.num, config.dims.hidden)))
        bias = rounded(reader.get(f"{router}.bias", (spec.num,))) if spec.bias else None
        self._router = reader.operations.new_linear(weight, bias)
        self._experts = Experts(reader, spec)
        self._shared = None if spec.shared is None else SharedExpert(reader)

    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return [T, hidden] for x [T, hidden]."""
        logits = step.operations.linear(self._router, x)
        routed = step.operations.route(logits, self._spec.top_k, renormalised=self._spec.renormalised)
        out = self._experts(step, x, routed)
        return out if self._shared is None else self._shared.add(step, x, out)


class SharedExpert:
    """An expert that all rows have, as far as its gate lets it through."""

    def __init__(self, reader: LayerReader) -> None:
        """Read the weights."""
        name, self._index = reader.config.names.shared_expert, reader.index
        both = f"{name}.gate_proj", f"{name}.up_proj"
        down = "shared_4h_to_h", (f"{name}.down_proj",)
        self._mlp = MlpBlock(reader, ("shared_gate", both), down, bias=False)
        self._gate = reader.linear("shared_expert_gate", (f"{name}_gate",))
        self._gate_group = reader.group("shared_expert_gate").name

    def add(self, step: Step, x: Tensor, out: Tensor) -> Tensor:
        """Add to out [T, hidden] what it makes of x [T, hidden]."""
        gate = step.linear(self._gate, x, self._index, self._gate_group)
        return step.operations.add_gated(out, self._mlp(step, x), gate)


def _grouped(reader: LayerReader, spec: ExpertsLayer, shapes: list[GroupShape], group: str) -> Grouped:
    """Return the linears of all experts, with what is added to them."""
    rounded = reader.reader.rounded
    biases: Iterable[Tensor | None] = [None] * len(shapes)
    if spec.bias:
        name = f"{_name_of_all(reader, group)}_bias"
        outs = shapes[0].out_features
        of_all = reader.get(name, (len(shapes), sum(outs)))
        biases = [_in_order(bias, len(outs) if spec.in_turns else 1) for bias in of_all]
    weights, added = [], []
    for weight, bias, shape in zip(_weights(reader, spec, shapes, group), biases, shapes, strict=True):
        own, own_bias = reader.part(reader.with_merged(weight, shape), bias, shape)
        weights.append(rounded(own))
        if own_bias is not None:
            added.append(rounded(own_bias))
    return reader.operations.new_grouped(weights, added or None, reader.reader.quantization)


def _weights(reader: LayerReader, spec: ExpertsLayer, shapes: list[GroupShape], group: str) -> Iterable[Tensor]:
    """Return the weight [out, in] of each expert's group, from one tensor of all or from those of each."""
    name, outs, inside = reader.config.names.experts, shapes[0].out_features, shapes[0].in_features
    of_all = _name_of_all(reader, group)
    leaves = reader.config.names.expert[:2] if group == EXPERTS_GATE_UP else reader.config.names.expert[2:]
    every: Iterable[Tensor]
    rows, columns = (len(shapes), sum(outs), inside), (len(shapes), inside, sum(outs))
    found = reader.reader.shape(reader.at + of_all) if spec.either else None
    if spec.in_turns or spec.transposed or found == columns != rows:
        turned = reader.get(of_all, columns)
        every = (_in_order(weight.t(), len(outs) if spec.in_turns else 1) for weight in turned)
    elif reader.has(of_all):
        every = reader.get(of_all, rows).unbind()
    else:
        parts = [(leaf, (out, inside)) for leaf, out in zip(leaves, outs, strict=True)]
        every = (
            reader.cat([(f"{name}.{expert}.{leaf}.weight", shape) for leaf, shape in parts])
            for expert in range(len(shapes))
        )
    return every


def _name_of_all(reader: LayerReader, group: str) -> str:
    """Return the name of the tensor of all experts that has the weights of a group of each."""
    names = reader.config.names
    return f"{names.experts}.{names.of_all_experts[group == EXPERTS_DOWN]}"


def _in_order(rows: Tensor, slices: int) -> Tensor:
    """Return rows of slices that come in turn, slice by slice, in memory of their own."""
    whole = rows.contiguous()  # columns become rows four times as fast as by picking
    return torch.cat([whole[index::slices] for index in range(slices)])


class BesideBlock:
    """The sum of both, each normed before and behind; it takes the hidden rows as they are."""

    def __init__(self, reader: LayerReader, spec: ExpertsLayer) -> None:
        """Read the weights."""
        config, self._spec = reader.config, spec
        names, hidden, rounded = config.names.beside, config.dims.hidden, reader.reader.rounded
        self._norm, self._mlp = reader.optional_norm(config.names.mlp_norm), MlpBlock.of_layer(reader)
        self._out_norm = reader.norm(names.mlp_out_norm)
        self._experts_norm, self._experts = reader.norm(names.experts_norm), Experts(reader, spec)
        self._experts_out_norm = reader.norm(names.experts_out_norm)
        scale = reader.get(names.router_scale, (hidden,)) * hidden**-0.5
        self._router_norm = RMSNorm(rounded(scale), config.norm_eps)
        router = reader.get(f"{config.names.router}.weight", (spec.num, hidden))
        self._router = reader.operations.new_linear(rounded(router))
        self._expert_scale = rounded(reader.get(names.expert_scale, (spec.num,))).float()

    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return [T, hidden] for hidden rows x [T, hidden]."""
        ops = step.operations
        normed = x if self._norm is None else ops.norm(x, self._norm, None, None)
        out = ops.norm(step.summed(self._mlp(step, normed)), self._out_norm, None, None)
        logits = ops.linear(self._router, ops.norm(x, self._router_norm, None, None))
        routed = ops.route(logits, self._spec.top_k, renormalised=self._spec.renormalised)
        scale = self._expert_scale.index_select(0, routed.ids.flatten()).view_as(routed.weights)
        routed = Routed(routed.ids, routed.weights * scale)
        of_experts = self._experts(step, ops.norm(x, self._experts_norm, None, None), routed)
        out.add_(ops.norm(step.summed(of_experts), self._experts_out_norm, None, None))
        # What ranks add is summed behind the block, too.
        return out if step.ranks is None or step.ranks.shard.is_first else out.zero_()
