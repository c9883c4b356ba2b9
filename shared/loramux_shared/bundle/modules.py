"""The modules that an adapter can target.

Ids and names up to 18 are TensorRT-LLM's; those from 100 on are our own, and are in bundles of version 2 alone.
Mind the cross: ``gate_proj`` is ``mlp_h_to_4h`` (5) and ``up_proj`` is ``mlp_gate`` (7).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.faults import CheckpointInvalid


@dataclass(frozen=True)
class Module:
    """A module kind."""

    id: int
    name: str
    hf: str
    """Hugging Face's name of it within its parent."""
    parent: str
    """Parent of the module within the layer; empty: the layer itself."""

    @property
    def path(self) -> str:
        """The module's name within the layer."""
        return f"{self.parent}.{self.hf}".lstrip(".")

    @property
    def label(self) -> str:
        """Return the shortest name of the module that is clear to people."""
        return label(self.path)


def label(path: str) -> str:
    """Return a module's name within the layer without its first part: ``q_proj``, ``shared_expert.up_proj``."""
    return path.partition(".")[2] or path


MODULES = (
    Module(1, "attn_q", "q_proj", "self_attn"),
    Module(2, "attn_k", "k_proj", "self_attn"),
    Module(3, "attn_v", "v_proj", "self_attn"),
    Module(4, "attn_dense", "o_proj", "self_attn"),
    Module(5, "mlp_h_to_4h", "gate_proj", "mlp"),
    Module(6, "mlp_4h_to_h", "down_proj", "mlp"),
    Module(7, "mlp_gate", "up_proj", "mlp"),
    Module(13, "moe_h_to_4h", "gate_proj", "mlp.experts"),
    Module(14, "moe_4h_to_h", "down_proj", "mlp.experts"),
    Module(15, "moe_gate", "up_proj", "mlp.experts"),
    Module(100, "delta_qkv", "in_proj_qkv", "linear_attn"),
    Module(101, "delta_z", "in_proj_z", "linear_attn"),
    Module(102, "delta_b", "in_proj_b", "linear_attn"),
    Module(103, "delta_a", "in_proj_a", "linear_attn"),
    Module(104, "delta_out", "out_proj", "linear_attn"),
    Module(110, "layer_input_gate", "per_layer_input_gate", ""),
    Module(111, "layer_input_projection", "per_layer_projection", ""),
    Module(120, "shared_h_to_4h", "gate_proj", "mlp.shared_expert"),
    Module(121, "shared_4h_to_h", "down_proj", "mlp.shared_expert"),
    Module(122, "shared_gate", "up_proj", "mlp.shared_expert"),
    Module(123, "shared_expert_gate", "shared_expert_gate", "mlp"),
    Module(124, "embedding", "embed_tokens", ""),
    Module(125, "head", "lm_head", ""),
    Module(126, "attn_heads", "query_key_value", "attention"),
    Module(130, "latent_q_a", "q_a_proj", "self_attn"),
    Module(131, "latent_q_b", "q_b_proj", "self_attn"),
    Module(132, "latent_kv_a", "kv_a_proj_with_mqa", "self_attn"),
    Module(133, "latent_kv_b", "kv_b_proj", "self_attn"),
    Module(140, "mamba_in", "in_proj", "mamba"),
    Module(141, "mamba_out", "out_proj", "mamba"),
)
BY_ID = {module.id: module for module in MODULES}
BY_NAME = {module.name: module for module in MODULES}
BY_PATH = {module.path: module for module in MODULES}
BY_HF = {module.hf: module for module in reversed(MODULES)}
TENSORRT_LLM: Final = frozenset(range(1, 8))
"""Ids of the modules that bundles of version 1 have."""
OF_EXPERTS: Final = frozenset({13, 14, 15})
"""Ids of the modules of each expert of a mixture, which TensorRT-LLM has too."""

NO_LAYER: Final = 65535
"""Layer number of a module that is in no layer."""
OF_NO_LAYER: Final = frozenset({124, 125})
"""Ids of the modules that are in no layer."""

FUSED: Final[Mapping[str, tuple[Module, ...]]] = {
    "qkv_proj": (BY_HF["q_proj"], BY_HF["k_proj"], BY_HF["v_proj"]),
    "gate_up_proj": (BY_HF["gate_proj"], BY_HF["up_proj"]),
}
"""Projections that are one matrix in some bases: its output rows are those of these modules, in this order."""
FUSED_PATHS: Final = {f"{modules[0].parent}.{name}": modules for name, modules in FUSED.items()}
"""The same by their names within the layer."""
Renamed = tuple[str, str]
"""The name within the layer that a base has for a module, and the one in `MODULES`."""
EXPERTS: Final = "mlp.experts"
"""Path of the experts of a layer, under any name that a base gives them."""
FUSED_OF_EXPERTS: Final = {
    f"{EXPERTS}.gate_up_proj": (BY_NAME["moe_h_to_4h"], BY_NAME["moe_gate"]),
    f"{EXPERTS}.down_proj": (BY_NAME["moe_4h_to_h"],),
}
"""The parameters that hold a matrix of each expert, and the modules whose rows each matrix has."""


@dataclass(frozen=True)
class BaseDims:
    """The shapes of a decoder that adapters must fit; `loramux_shared.bundle.modules` reads them."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    fused: frozenset[str] = frozenset()
    """The fused projections that the base has, by their leaf names."""


MAX_LAYERS: Final = 4096
"""Beyond it a config is not believed: each layer is described on its own."""


def read_dims(config: HfConfig, defaults: Mapping[str, int]) -> BaseDims:
    """Read the sizes; defaults are what transformers means by those that a config of the family leaves out.

    Raises:
        CheckpointInvalid: a size is missing or no positive integer, or they do not go together.
    """
    config = HfConfig({**defaults, **config.fields}, config.architecture, config.max_seq_len)
    heads, hidden = config.size("num_attention_heads"), config.size("hidden_size")
    dims = BaseDims(
        num_layers=config.size("num_hidden_layers"),
        hidden=hidden,
        intermediate=config.size("intermediate_size"),
        num_heads=heads,
        num_kv_heads=config.size("num_key_value_heads", heads),
        head_dim=config.size("head_dim", hidden // heads),
        vocab=config.size("vocab_size"),
    )
    if dims.num_layers > MAX_LAYERS:
        raise CheckpointInvalid(
            f"config.json: num_hidden_layers: expected at most {MAX_LAYERS}, found {dims.num_layers}."
        )
    if dims.num_heads % dims.num_kv_heads:
        raise CheckpointInvalid(
            f"config.json: num_key_value_heads: expected a divisor of num_attention_heads {dims.num_heads}, "
            f"found {dims.num_kv_heads}."
        )
    return dims
