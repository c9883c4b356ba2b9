"""The kernels for GPUs, which Triton's interpreter runs too."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from inference_service.engine.backends.base import Attention, Delta, LayerHeads, Rotation, StepLora
from inference_service.engine.backends.operations import Grouped, Operations
from inference_service.engine.backends.triton_lora import TritonLora
from inference_service.engine.kernels import experts, rows
from inference_service.engine.kernels.attention import (
    AttentionCapacity,
    AttentionTables,
    Context,
    Cut,
    Inputs,
    attend,
    cut_of,
    pack_tables,
)
from inference_service.engine.kernels.delta import (
    DeltaCapacity,
    DeltaTables,
    StateChunk,
    delta_tile,
    gated_delta,
    pack_delta,
)
from inference_service.engine.kernels.experts import ByExpert, Routed
from inference_service.engine.kernels.integers import quantize
from inference_service.engine.kernels.packing import power_of_two
from inference_service.engine.kernels.rounded import PackedWeight, round_rows
from inference_service.engine.kernels.rows import Activation
from inference_service.engine.kernels.sgmv import Update
from inference_service.engine.layers.linear import Linear
from inference_service.engine.layers.norm import LayerNorm, RMSNorm
from inference_service.engine.layers.on_gpu import Fp8Linear, PackedLinear
from loramux_shared.bases.memory import Keeps
from loramux_shared.bases.rope import HeadCounts
from loramux_shared.runtime import Rounding


class TritonOperations(Operations):
    """One launch each, on a GPU or in Triton's interpreter."""

    tumbles = False

    keeps: Keeps = "int4"

    def __init__(
        self,
        heads: Sequence[HeadCounts],
        dtype: torch.dtype,
        device: torch.device,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        """Take the distinct heads of the model's layers, and the rest as `Operations`.

        Raises:
            ValueError: there is no tile for them.
        """
        super().__init__(dtype, device, cache_dtype)
        self._fp8_widths: set[int] = set()
        """Widths of rows that linears read in fp8: what makes such rows writes them so too."""
        self._cuts = {each: cut_of(device, dtype, each) for each in heads}
        self._deltas: dict[DeltaCapacity, DeltaTables] = {}
        self._tables: dict[AttentionCapacity, AttentionTables] = {}

    def new_linear(
        self, weight: Tensor, bias: Tensor | None = None, quantization: Rounding = Rounding.NONE
    ) -> Linear:
        """Return a linear that widens integers in registers, or rounds rows to fp8 in one launch."""
        quantized = quantize(weight, quantization)
        if quantized is not None:
            return PackedLinear(PackedWeight.of(quantized), bias)
        if quantization is Rounding.FP8 and Fp8Linear.takes(weight):
            self._fp8_widths.add(weight.shape[1])
            return Fp8Linear(weight, bias, round_rows)
        return super().new_linear(weight, bias)

    def apply_with_lora(self, layer: Linear, x: Tensor, lora: StepLora, index: int, group: str) -> Tensor:
        """Return [T, out]; the adapters' first half runs beside the base's product where that is recorded."""
        if isinstance(lora, TritonLora):
            return lora.apply_with_lora(partial(self.linear, layer, x), x, index, group)
        return super().apply_with_lora(layer, x, lora, index, group)

    def apply_deferring_lora(
        self, layer: Linear, x: Tensor, lora: StepLora, index: int, group: str
    ) -> tuple[Tensor, Update | None]:
        """Return [T, out]; in steps of few rows, what reads it computes the adapters' second half."""
        if isinstance(lora, TritonLora):
            return lora.apply_deferring_lora(partial(self.linear, layer, x), x, index, group)
        return super().apply_deferring_lora(layer, x, lora, index, group)

    def apply_experts_with_lora(
        self,
        layer: Grouped,
        x: Tensor,
        lora: StepLora,
        index: int,
        group: str,
        pairs: ByExpert,
        *,
        of_tokens: bool = False,
    ) -> Tensor:
        """Return [pairs, out] of all experts, adapters included; x by token is not laid out by place."""
        if isinstance(lora, TritonLora):
            base = partial(layer, x, pairs, of_tokens=of_tokens)
            return lora.apply_experts_with_lora(base, x, index, group, pairs, of_tokens=of_tokens)
        return super().apply_experts_with_lora(layer, x, lora, index, group, pairs, of_tokens=of_tokens)

    def apply_experts_deferring_lora(
        self, layer: Grouped, x: Tensor, lora: StepLora, index: int, group: str, pairs: ByExpert
    ) -> tuple[Tensor, Update | None]:
        """Return [pairs, out] of all experts; what reads it may compute the adapters' second half."""
        if isinstance(lora, TritonLora):
            return lora.apply_experts_deferring_lora(
                partial(layer, x, pairs, of_tokens=True), x, index, group, pairs
            )
        return super().apply_experts_deferring_lora(layer, x, lora, index, group, pairs)

    def embed(self, tokens: Tensor, table: Tensor, scale: float) -> Tensor:
        """The scale included."""
        return rows.embed(tokens, table, scale)

    def norm(
        self,
        hidden: Tensor,
        norm: RMSNorm,
        delta: Tensor | None,
        delta_norm: RMSNorm | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Both norms and the sum, but for a delta's norm that subtracts a mean."""
        if isinstance(delta_norm, LayerNorm):
            return super().norm(hidden, norm, delta, delta_norm, out)
        return rows.norm(
            hidden,
            norm.weight,
            eps=norm.eps,
            offset=norm.offset,
            centred=isinstance(norm, LayerNorm),
            bias=norm.bias,
            delta=delta,
            delta_weight=None if delta_norm is None else delta_norm.weight,
            out=out,
            fp8=out is None and hidden.shape[1] in self._fp8_widths,
        )

    def gated(self, gate_up: Tensor, activation: Activation, update: Update | None = None) -> Tensor:
        """The product and the update included."""
        return rows.gated(gate_up, activation, update, fp8=gate_up.shape[1] // 2 in self._fp8_widths)

    def activated(self, x: Tensor, activation: Activation, update: Update | None = None) -> Tensor:
        """The update included."""
        return rows.activated(x, activation, update, fp8=x.shape[1] in self._fp8_widths)

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """Cap the logits in place."""
        rows.softcap(logits, cap)
        return logits

    def new_grouped(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] | None = None,
        quantization: Rounding = Rounding.NONE,  # noqa: ARG002 - the kernel multiplies whole values
    ) -> Grouped:
        """Return a linear of each weight [out, in], all in one piece."""
        return GroupedAtOnce(torch.stack([*weights]), None if biases is None else torch.stack([*biases]))

    def route(self, logits: Tensor, top_k: int, *, renormalised: bool) -> Routed:
        """Route in one launch."""
        return experts.route(logits, top_k, renormalised=renormalised)

    def by_expert(self, routed: Routed, num_experts: int) -> ByExpert:
        """Sort by expert in one launch."""
        return experts.by_expert(routed.ids, num_experts)

    def combine(self, y: Tensor, routed: Routed, pairs: ByExpert) -> Tensor:
        """Combine in one launch."""
        return experts.combine(y, routed, pairs)

    def clamped(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        """Compute the clamped gate in one launch."""
        return experts.clamped(gate_up, alpha, limit)

    def recurrence(self, chunks: Sequence[StateChunk]) -> Delta:
        """Return a recurrence of kernels, with tables that are reused for steps of the same size class."""
        size = power_of_two(len(chunks))
        capacity = DeltaCapacity(size, size)
        if any(chunk.length > 1 for chunk in chunks):
            rows = power_of_two(sum(chunk.length for chunk in chunks))
            capacity = DeltaCapacity(rows, size, delta_tile(self._dtype))
        if capacity not in self._deltas:
            self._deltas[capacity] = DeltaTables.allocate(capacity, self._device)
        tables = self._deltas[capacity]
        tables.load(torch.from_numpy(pack_delta(capacity, chunks)))
        return partial(gated_delta, tables=tables)

    def attention(
        self, contexts: Sequence[Context], block_size: int, windows: Sequence[int | None]
    ) -> Attention:
        """Return attention with tables that are reused for steps of the same size class."""
        num_rows = max(context.row + context.length for context in contexts)
        longest = max(-(-context.end // block_size) for context in contexts)
        mixed = any(context.length > 1 for context in contexts)
        tables: dict[Cut, AttentionTables] = {}
        for cut in dict.fromkeys(self._cuts.values()):
            capacity = AttentionCapacity(
                rows=power_of_two(num_rows),
                chunks=power_of_two(len(contexts)),
                blocks_per_chunk=power_of_two(longest),
                block_size=block_size,
                tile=cut.tile if mixed else None,
                kv_heads=cut.kv_heads,
                groups=len(windows),
            )
            if capacity not in self._tables:
                self._tables[capacity] = AttentionTables.allocate(capacity, self._device)
            tables[cut] = self._tables[capacity]
            tables[cut].load(torch.from_numpy(pack_tables(capacity, contexts)))
        return TritonAttention({heads: tables[cut] for heads, cut in self._cuts.items()}, windows)


class GroupedAtOnce(Grouped):
    """A linear of each expert, one launch for all, which the host does not ask for."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take weights [E, out, in] and biases [E, out]."""
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor, pairs: ByExpert, *, of_tokens: bool = False) -> Tensor:
        """Return [pairs, out]."""
        return experts.grouped(x, self._weight, pairs, self._bias, of_tokens=of_tokens)


class TritonAttention:
    """Attention with the kernels for GPUs.

    Update, norm, rotation and write in one launch, then one to three that attend.
    """

    def __init__(
        self, tables: Mapping[HeadCounts, AttentionTables], windows: Sequence[int | None] = (None,)
    ) -> None:
        """Take the tables of layers by their heads, and the windows of the groups that they hold.

        They hold the step by the time that the launches run.
        """
        self.tables = {
            (heads, window): each.of(group)
            for heads, each in tables.items()
            for group, window in enumerate(windows)
        }

    def prepare_rotation(self, cos: Tensor, sin: Tensor) -> Rotation:
        """[T, rotary]."""
        return cos.squeeze(1), sin.squeeze(1)

    def __call__(self, layer: LayerHeads) -> Tensor:
        """Rows that belong to no chunk are 0."""
        spec, norm, writes = layer.spec, layer.norm, layer.spec.keys_of is None
        inputs = Inputs(
            layer.heads, *layer.rotation, layer.keys, layer.values, writes=writes, scales=layer.scales
        )
        tables, head_norm = self.tables[inputs.counts, spec.window], None if norm is None else norm.of_heads
        return attend(inputs, tables, spec, head_norm, layer.sinks, layer.update).flatten(1)
