"""A mixture of experts beside an MLP that all rows have."""

from __future__ import annotations

from torch import Tensor

from inference_service.kernels.experts import Routed
from inference_service.layers.norm import RMSNorm
from inference_service.models.blocks.experts import Experts
from inference_service.models.blocks.mlp import MlpBlock
from inference_service.models.reader import LayerReader
from inference_service.models.step import Step
from loramux_shared.bases.layers import ExpertsLayer


class BesideBlock:
    """The sum of both, each normed before and behind; it takes the hidden rows as they are."""

    def __init__(self, reader: LayerReader, spec: ExpertsLayer) -> None:
        """Read the weights.

        Raises:
            CheckpointInvalid: a tensor is missing, or has another shape than the config implies.
        """
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
        out = ops.norm(self._mlp(step, normed), self._out_norm, None, None)
        logits = ops.linear(self._router, ops.norm(x, self._router_norm, None, None))
        routed = ops.route(logits, self._spec.top_k, renormalised=self._spec.renormalised)
        scale = self._expert_scale.index_select(0, routed.ids.flatten()).view_as(routed.weights)
        routed = Routed(routed.ids, routed.weights * scale)
        of_experts = self._experts(step, ops.norm(x, self._experts_norm, None, None), routed)
        return out.add_(ops.norm(of_experts, self._experts_out_norm, None, None))
