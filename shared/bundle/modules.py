"""The modules that an adapter can target, and their dims in a base checkpoint.

Ids and names are TensorRT-LLM's. Mind the cross: ``gate_proj`` is ``mlp_h_to_4h`` (5) and ``up_proj`` is
``mlp_gate`` (7).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from shared.bundle.geometry import refuse_other_geometry
from shared.faults import CheckpointInvalid


@dataclass(frozen=True)
class Module:
    """A module kind."""

    id: int
    name: str
    hf: str
    """Hugging Face's leaf name in a Llama-like decoder."""


MODULES = (
    Module(1, "attn_q", "q_proj"),
    Module(2, "attn_k", "k_proj"),
    Module(3, "attn_v", "v_proj"),
    Module(4, "attn_dense", "o_proj"),
    Module(5, "mlp_h_to_4h", "gate_proj"),
    Module(6, "mlp_4h_to_h", "down_proj"),
    Module(7, "mlp_gate", "up_proj"),
)
BY_ID = {module.id: module for module in MODULES}
BY_NAME = {module.name: module for module in MODULES}
BY_HF = {module.hf: module for module in MODULES}

FUSED: Final[Mapping[str, tuple[Module, ...]]] = {
    "qkv_proj": (BY_HF["q_proj"], BY_HF["k_proj"], BY_HF["v_proj"]),
    "gate_up_proj": (BY_HF["gate_proj"], BY_HF["up_proj"]),
}
"""Projections that are one matrix in some bases: its output rows are those of these modules, in this order."""
_FUSED_IN: Final = {"phi3": frozenset(FUSED)}
_GEMMA: Final = {
    "head_dim": 256,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
}
# What transformers means by a size that a config leaves out; the decoders of models with images leave out many.
_DEFAULTS: Final[Mapping[str, Mapping[str, int]]] = {
    "gemma2": {"vocab_size": 256000} | _GEMMA,
    "gemma3_text": {"vocab_size": 262208} | _GEMMA,
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}


@dataclass(frozen=True)
class BaseDims:
    """The shapes of a decoder that adapters must fit, from the base's ``config.json``."""

    model_type: str
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int

    @property
    def fused(self) -> frozenset[str]:
        """The fused projections that this base has, by their leaf names."""
        return _FUSED_IN.get(self.model_type, frozenset())

    def features(self, module: Module) -> tuple[int, int]:
        """Return (in, out) of a module."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
            "up_proj": (self.hidden, self.intermediate),
        }[module.hf]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BaseDims:
        """Read the dims from a checkpoint's ``config.json``.

        Raises:
            CheckpointInvalid: a size is missing or no positive integer, or the layers are of another geometry.
        """
        text = config.get("text_config") or config
        if not isinstance(text, dict):
            raise CheckpointInvalid(
                f"config.json: text_config: expected an object, found {type(text).__name__}"
            )
        refuse_other_geometry(text)
        model_type = str(text.get("model_type", ""))
        text = {**_DEFAULTS.get(model_type, {}), **text}
        sizes = {}
        for field, key, default in (
            ("num_layers", "num_hidden_layers", None),
            ("hidden", "hidden_size", None),
            ("intermediate", "intermediate_size", None),
            ("num_heads", "num_attention_heads", None),
            ("num_kv_heads", "num_key_value_heads", text.get("num_attention_heads")),
            ("vocab", "vocab_size", None),
        ):
            sizes[field] = _size(text, key, default)
        head_dim = _size(text, "head_dim", sizes["hidden"] // sizes["num_heads"])
        return cls(model_type=model_type, head_dim=head_dim, **sizes)


def _size(text: dict[str, Any], key: str, default: Any) -> int:
    value = text.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointInvalid(
            f"config.json: {key}: expected a positive integer, found {value!r}. "
            "The base must be a decoder checkpoint in Hugging Face format."
        )
    return value
