"""A decoder as the papers write it, in float32: no paging, no packing, no fusing, one sequence at a time.

Slow and short, and apart from everything that serves: proofs are computed with it. Files are read from disk
one after the other, so it takes the memory of one file and of the embeddings.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from inference_service.engine.layers.rope import frequencies
from inference_service.engine.models.checkpoint import Checkpoint
from loramux_prove import delta
from loramux_prove.adapter_source import SourceAdapter
from loramux_prove.factors import ReferenceFactors
from loramux_prove.fingerprint import EMBEDDING, HEAD
from loramux_prove.vocabulary_source import OwnRows, OwnTable, embedded, headed
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.layers import AttentionLayer, DeltaLayer, ExpertsLayer, InputLayer, MlpLayer
from loramux_shared.bases.rope import AttentionSpec, QueryScaling, RopeSpec
from loramux_shared.bundle.modules import NO_LAYER
from loramux_shared.faults import CheckpointInvalid

GATE_UP = ("mlp_h_to_4h", "mlp_gate")
DELTA = ("delta_qkv", "delta_z", "delta_b", "delta_a")


@dataclass
class Run:
    """One sequence under one adapter."""

    adapter: SourceAdapter
    tokens: Sequence[int]
    hidden: Tensor
    """[T, hidden]"""
    entered: Tensor = field(default_factory=lambda: torch.empty(0))
    """[T, hidden]: what it was before the layer."""
    added: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """Part that the adapter added to each module's output at the last position, [out].

    Embeddings and head are in no layer.
    """
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    """[vocab], behind the last position."""
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values [kv heads, T, head_dim] of layers, for those that read another's."""
    inputs: Tensor = field(default_factory=lambda: torch.empty(0))
    """[T, layers, width]: what tokens give to layers."""


class Reference:
    """Computes sequences under adapters."""

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        """Begin with a base.

        Raises:
            CheckpointInvalid: it has layers that are not written a second time.
        """
        self._config = config
        for mixer in dict.fromkeys(layer.mixer for layer in config.layers):
            if type(mixer) not in (AttentionLayer, DeltaLayer):
                raise CheckpointInvalid(
                    f"the base has {mixer.label}, which has no proofs. Build without prove."
                )
        self._mlps = [_dense(layer.mlp) for layer in config.layers]
        self._checkpoint = Checkpoint(
            folder, torch.float32, torch.device("cpu"), quantization=config.quantization
        )
        names = config.names
        found = self._checkpoint.first([f"{prefix}{names.final_norm}.weight" for prefix in names.prefixes])
        self._prefix = found.removesuffix(f"{names.final_norm}.weight")
        self._embedding, self._head = self._tables()

    def replaced(self, adapter: SourceAdapter) -> list[int]:
        """Return the tokens that an adapter has other embeddings for, one by one."""
        own = adapter.own.get(EMBEDDING)
        return own.differing(self._embedding).tolist() if isinstance(own, OwnRows) else []

    @torch.inference_mode()
    def run(
        self, sequences: Mapping[str, Sequence[Sequence[int]]], adapters: Mapping[str, SourceAdapter]
    ) -> dict[str, list[Run]]:
        """Return the runs of every adapter's sequences under it, by its name."""
        config, names = self._config, self._config.names
        runs = {
            name: [self._begun(adapter, tokens) for tokens in sequences[name]]
            for name, adapter in adapters.items()
        }
        everyone = [run for each in runs.values() for run in each]
        self._give_inputs(everyone)
        for index, spec in enumerate(config.layers):
            at = names.layer.format(index=index)
            for run in everyone:
                run.entered = run.hidden
            if isinstance(spec.mixer, DeltaLayer):
                self._delta(index, at, spec.mixer, everyone)
            elif isinstance(spec.mixer, AttentionLayer):
                self._attention(index, at, spec.mixer, everyone)
            self._mlp(index, at, self._mlps[index], everyone)
            self._let_inputs_in(index, at, spec.inputs, everyone)
            if names.scalar is not None:
                scalar = self._checkpoint.get(f"{self._prefix}{at}{names.scalar}", (1,))
                for run in everyone:
                    run.hidden = run.hidden * scalar
        norm = self._row_norm(names.final_norm)
        for run in everyone:
            logits = self._logits(run, self._normed(run.hidden[-1], norm)) / config.logit_divisor
            cap = config.logit_softcap
            run.logits = logits if cap is None else torch.tanh(logits / cap) * cap
        return runs

    def _begun(self, adapter: SourceAdapter, tokens: Sequence[int]) -> Run:
        """Return a run that has embedded its tokens."""
        ids, scale = torch.tensor(tokens), self._config.embedding_scale
        run = Run(adapter, tokens, self._embedding[ids] * scale)
        own = adapter.own.get(EMBEDDING)
        if own is not None and not _is_copy(own, self._embedding):
            hidden = embedded(own, self._embedding, ids) * scale
            run.added[NO_LAYER, EMBEDDING] = (hidden - run.hidden)[-1]
            run.hidden = hidden
        return run

    def _logits(self, run: Run, x: Tensor) -> Tensor:
        """Return what the head makes of x [hidden]."""
        logits, own = self._head @ x, run.adapter.own.get(HEAD)
        if own is not None and not _is_copy(own, self._head):
            changed = headed(own, self._head, x)
            run.added[NO_LAYER, HEAD] = changed - logits
            logits = changed
        if self._config.head_bias:
            names, vocab = self._config.names.heads, self._config.dims.vocab
            bias = self._checkpoint.get(self._checkpoint.first([f"{name}.bias" for name in names]), (vocab,))
            logits[:vocab] += bias
        return logits

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Embeddings and head [vocab, hidden]; of a tied model, each is the other where it is not there."""
        shape = (self._config.dims.vocab, self._config.dims.hidden)
        names = [
            f"{self._prefix}{self._config.names.embedding}.weight",
            self._checkpoint.first([f"{name}.weight" for name in self._config.names.heads]),
        ]
        there = [name for name in names if self._checkpoint.has(name)]
        selected = there if there and self._config.tied_embeddings else names
        tables = [self._checkpoint.get(name, shape) for name in selected]
        return tables[0], tables[-1]

    def _attention(self, index: int, at: str, spec: AttentionLayer, runs: Sequence[Run]) -> None:
        config, names, hidden = self._config, self._config.names, self._config.dims.hidden
        q, group = spec.q_features, spec.groups(hidden)[0]
        slices = group.out_features
        before, behind = self._optional(at, names.input_norm), self._optional(at, names.attention_out_norm)
        q_norm, k_norm = self._qk_norms(at, spec)
        qkv = self._linear(at, names.qkv[: len(slices)], slices, hidden, config.qkv_bias)
        out = self._linear(at, (names.o,), (hidden,), q, config.o_bias)
        for run in runs:
            x = self._maybe_normed(run.hidden, before)
            parts = _project(run, index, group.modules, x, qkv, slices)
            if spec.by_head:
                each = parts[0].view(len(x), spec.num_heads, 3, spec.head_dim)
                parts = [part.flatten(1) for part in each.unbind(2)]
            parts[0], gate = _parted(parts[0], spec)
            queries = _scaled_queries(
                _rotate(self._heads(parts[0], q_norm, spec), spec.rope), config.query_scaling
            )
            if spec.attention.keys_of is None:
                keys, values = self._heads(parts[1], k_norm, spec), self._heads(parts[-1], None, spec)
                run.kept[index] = _rotate(keys, spec.rope), self._values(values, spec)
            keys, values = run.kept[index if spec.attention.keys_of is None else spec.attention.keys_of]
            seen = _attend(queries, keys, values, spec.attention).transpose(0, 1).reshape(len(x), q)
            (y,) = _project(run, index, ("attn_dense",), seen * gate, out, (hidden,))
            run.hidden = run.hidden + self._maybe_normed(y * config.residual_scale, behind)

    def _delta(self, index: int, at: str, spec: DeltaLayer, runs: Sequence[Run]) -> None:
        names, hidden = self._config.names, self._config.dims.hidden
        own, heads = names.delta, (spec.value_heads,)
        outs = (spec.channels, spec.value_features, *heads, *heads)
        before = self._optional(at, names.input_norm)
        inputs = self._linear(at, own.inputs, outs, hidden, bias=False)
        out = self._linear(at, (own.out,), (hidden,), spec.value_features, bias=False)
        whole = f"{self._prefix}{at}"
        taps = self._checkpoint.get(whole + own.conv, (spec.channels, 1, spec.conv_width))[:, 0]
        decay, dt_bias = (self._checkpoint.get(whole + name, heads) for name in (own.decay, own.dt_bias))
        norm = self._get(at + own.norm, (spec.value_dim,))
        for run in runs:
            qkv, z, b, a = _project(run, index, DELTA, self._maybe_normed(run.hidden, before), inputs, outs)
            x = delta.taken_in(qkv, taps)
            x = delta.recalled(spec, x, delta.written(b), delta.decay_of(a, decay, dt_bias))
            x = delta.gated(x, z, norm, self._config.norm_eps)
            (y,) = _project(run, index, ("delta_out",), x, out, (hidden,))
            run.hidden = run.hidden + y

    def _mlp(self, index: int, at: str, spec: MlpLayer, runs: Sequence[Run]) -> None:
        config, names, hidden = self._config, self._config.names, self._config.dims.hidden
        parallel = config.parallel
        before = self._optional(at, names.input_norm if parallel and names.mlp_norm is None else names.mlp_norm)
        behind = self._optional(at, names.mlp_out_norm)
        modules = GATE_UP if spec.gated else GATE_UP[:1]
        halves = (spec.intermediate,) * len(modules)
        gate_up = self._linear(at, names.gate_up, halves, hidden, config.mlp_bias)
        down = self._linear(at, (names.down,), (hidden,), spec.intermediate, config.mlp_bias)
        for run in runs:
            x = self._maybe_normed(run.entered if parallel else run.hidden, before)
            gate, *up = _project(run, index, modules, x, gate_up, halves)
            active = math.prod(up, start=self._active(gate))
            (y,) = _project(run, index, ("mlp_4h_to_h",), active, down, (hidden,))
            run.hidden = run.hidden + self._maybe_normed(y * config.residual_scale, behind)

    def _give_inputs(self, runs: Sequence[Run]) -> None:
        """Make what tokens give to layers."""
        config, spec, names = self._config, self._config.inputs, self._config.names.inputs
        if spec is None:
            return
        hidden, width = config.dims.hidden, config.dims.num_layers * spec.width
        table = self._get(names.table, (spec.vocab, width))
        projection, norm = self._get(names.projection, (width, hidden)), self._get(names.norm, (spec.width,))
        for run in runs:
            shape = len(run.hidden), config.dims.num_layers, spec.width
            rows = table[list(run.tokens)].view(shape) * spec.width**0.5
            projected = (run.hidden @ projection.T).view(shape) * hidden**-0.5
            run.inputs = (self._normed(projected, norm) + rows) / 2**0.5

    def _let_inputs_in(self, index: int, at: str, spec: InputLayer | None, runs: Sequence[Run]) -> None:
        if spec is None:
            return
        names, hidden, width = self._config.names.inputs, self._config.dims.hidden, spec.width
        gate = self._linear(at, (names.gate,), (width,), hidden, False)
        projection = self._linear(at, (names.layer_projection,), (hidden,), width, False)
        norm = self._get(at + names.out_norm, (hidden,))
        for run in runs:
            (x,) = _project(run, index, ("layer_input_gate",), run.hidden, gate, (width,))
            x = self._active(x) * run.inputs[:, index]
            (y,) = _project(run, index, ("layer_input_projection",), x, projection, (hidden,))
            run.hidden = run.hidden + self._normed(y, norm)

    def _active(self, x: Tensor) -> Tensor:
        if self._config.activation == "silu":
            return silu(x)
        return gelu(x, approximate="tanh" if self._config.activation == "gelu_tanh" else "none")

    def _values(self, values: Tensor, spec: AttentionLayer) -> Tensor:
        """Norm values [kv heads, T, head_dim], where they are normed at all."""
        plain = torch.tensor(1.0 - self._config.norm_offset)
        return self._normed(values, plain) if spec.values_normed else values

    def _qk_norms(self, at: str, spec: AttentionLayer) -> tuple[Tensor | None, Tensor | None]:
        """Weights of queries and keys, of a head or of all heads; None where there are none."""
        names, of_heads = self._config.names, self._config.qk_norm_of_heads
        q, k = (spec.head_dim, spec.head_dim) if of_heads else (spec.q_features, spec.kv_features)
        k = k if spec.attention.keys_of is None else 0
        return (
            None if names.q_norm is None else self._get(at + names.q_norm, (q,)),
            None if names.k_norm is None or not k else self._get(at + names.k_norm, (k,)),
        )

    def _heads(self, x: Tensor, norm: Tensor | None, spec: AttentionLayer) -> Tensor:
        """Norm x [T, all heads together] in parts as long as the norm; return [heads, T, head_dim]."""
        if norm is not None:
            x = self._normed(x.reshape(len(x), -1, len(norm)), norm)
        return x.reshape(len(x), -1, spec.head_dim).transpose(0, 1)

    def _optional(self, at: str, name: str | None) -> Tensor | None:
        """Weights of a norm, where there is one."""
        return None if name is None else self._row_norm(at + name)

    def _row_norm(self, name: str) -> Tensor:
        """Weights [hidden] of a norm; of one that subtracts the mean, weights and biases [2, hidden]."""
        config, shape = self._config, (self._config.dims.hidden,)
        weight = self._get(name, shape)
        if not config.layer_norm:
            return weight
        return torch.stack([weight, self._get(name, shape, "bias") if config.norm_bias else torch.zeros(shape)])

    def _maybe_normed(self, x: Tensor, norm: Tensor | None) -> Tensor:
        return x if norm is None else self._normed(x, norm)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        if self._config.layer_norm:
            x = x - x.mean(-1, keepdim=True)
            return (
                x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self._config.norm_eps) * weight[0] + weight[1]
            )
        root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self._config.norm_eps)
        return x * root * (weight + self._config.norm_offset)

    def _linear(
        self, at: str, names: tuple[str, ...], outs: tuple[int, ...], features: int, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in] and bias of several linears as one, as which a checkpoint may have them."""
        sizes = outs if len(names) == len(outs) else (sum(outs),)
        parts = list(zip(names, sizes, strict=True))
        weight = torch.cat([self._get(at + name, (size, features)) for name, size in parts])
        return weight, torch.cat(
            [self._get(at + name, (size,), "bias") for name, size in parts]
        ) if bias else None

    def _get(self, name: str, shape: tuple[int, ...], kind: str = "weight") -> Tensor:
        return self._checkpoint.get(f"{self._prefix}{name}.{kind}", shape)


def _dense(spec: MlpLayer | ExpertsLayer) -> MlpLayer:
    if isinstance(spec, ExpertsLayer):
        raise CheckpointInvalid(
            "the base is a mixture of experts: which of them a row has may change by rounding alone, so a "
            "replica could not be held to a proof. Build without prove."
        )
    if type(spec) is not MlpLayer:
        raise CheckpointInvalid(
            "the base has MLPs with an activation of their own, which have no proofs. Build without prove."
        )
    return spec


def _parted(queries: Tensor, spec: AttentionLayer) -> tuple[Tensor, Tensor | float]:
    """Part the queries of all heads from what each head's output is multiplied with."""
    if not spec.gated:
        return queries, 1.0
    both = queries.view(len(queries), spec.num_heads, 2, spec.head_dim)
    return both[:, :, 0].flatten(1), torch.sigmoid(both[:, :, 1].flatten(1))


def _project(
    run: Run,
    layer: int,
    modules: tuple[str, ...],
    x: Tensor,
    linear: tuple[Tensor, Tensor | None],
    sizes: tuple[int, ...],
) -> list[Tensor]:
    """Return the outputs of modules that share an input, each with what the adapter makes of it."""
    weight, bias = linear
    y = x @ weight.T
    outputs = list(torch.split(y if bias is None else y + bias, list(sizes), dim=-1))
    for place, module in enumerate(modules):
        factors = run.adapter.layers.get((layer, module))
        if factors is None:
            continue
        if factors.plain:
            added = factors.added(x)
            run.added[layer, module] = added[-1]
            outputs[place] = outputs[place] + added
            continue
        begin = sum(sizes[:place])
        own = slice(begin, begin + sizes[place])
        own_bias = None if bias is None else bias[own]
        if not _is_idle(factors, own_bias):
            changed = factors.changed(x, y[:, own], weight[own], own_bias)
            run.added[layer, module] = (changed - outputs[place])[-1]
            outputs[place] = changed
    return outputs


def _is_idle(factors: ReferenceFactors, bias: Tensor | None) -> bool:
    """Return True if its only content is scales of 1, or the base's own bias."""
    if len(factors.a):
        return False
    scaled = factors.magnitude is not None and not bool((factors.magnitude == 1).all())
    own = torch.zeros(()) if bias is None else bias
    return not scaled and (factors.bias is None or bool((factors.bias == own).all()))


def _is_copy(own: OwnTable, table: Tensor) -> bool:
    """Return True if its only content is rows of the base."""
    return isinstance(own, OwnRows) and not len(own.differing(table))


def _rotate(x: Tensor, spec: RopeSpec) -> Tensor:
    """Rotate the leading dimensions of x [heads, T, head_dim] by their positions."""
    angles = torch.outer(torch.arange(x.shape[1]).float(), frequencies(spec))
    cos, sin = angles.cos() * spec.scaling.magnitude, angles.sin() * spec.scaling.magnitude
    if spec.neighbours:
        first, second = x[..., 0 : spec.dim : 2], x[..., 1 : spec.dim : 2]
        both = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
        return torch.cat([both, x[..., spec.dim :]], dim=-1)
    first, second = x[..., : spec.dim // 2], x[..., spec.dim // 2 : spec.dim]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., spec.dim :]], dim=-1)


def _scaled_queries(queries: Tensor, spec: QueryScaling | None) -> Tensor:
    """Multiply queries [heads, T, head_dim] with what their positions say."""
    if spec is None:
        return queries
    positions = torch.arange(queries.shape[1])
    return queries * (1 + spec.beta * torch.log(1 + torch.floor(positions / spec.length)))[:, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Causal attention of q [heads, T, d] over k and v [kv heads, T, d]."""
    groups = len(q) // len(k)
    k, v = k.repeat_interleave(groups, dim=0), v.repeat_interleave(groups, dim=0)
    scores = q @ k.transpose(1, 2) * spec.scale
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    rows, columns = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])
    hidden = columns > rows
    if spec.window is not None:
        hidden |= columns <= rows - spec.window
    return torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1) @ v
