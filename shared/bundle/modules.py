"""The modules that an adapter can target, and their dims in a base checkpoint.

Ids and names are TensorRT-LLM's. Mind the cross: ``gate_proj`` is ``mlp_h_to_4h`` (5) and ``up_proj`` is
``mlp_gate`` (7).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
            CheckpointInvalid: a size is missing or no positive integer.
        """
        text = config.get("text_config") or config
        sizes = {}
        for field, key, default in (
            ("num_layers", "num_hidden_layers", None),
            ("hidden", "hidden_size", None),
            ("intermediate", "intermediate_size", None),
            ("num_heads", "num_attention_heads", None),
            ("num_kv_heads", "num_key_value_heads", text.get("num_attention_heads")),
            ("vocab", "vocab_size", None),
        ):
            value = text.get(key)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointInvalid(
                    f"config.json: {key}: expected a positive integer, found {value!r}. "
                    "The base must be a decoder checkpoint in Hugging Face format."
                )
            sizes[field] = value
        head_dim = text.get("head_dim") or sizes["hidden"] // sizes["num_heads"]
        return cls(model_type=str(text.get("model_type", "")), head_dim=head_dim, **sizes)
