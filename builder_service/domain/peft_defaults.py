"""The modules that PEFT adapts where a config names none: its own tables, by the ``model_type`` of the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from builder_service.domain.kinds import Kind

Targets = tuple[str, ...] | str
"""Names, or a pattern."""

_QUERY_VALUE: Final[Mapping[str, Targets]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"), ("q_proj", "v_proj")),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}
_IA3: Final[Mapping[str, Targets]] = {
    **dict.fromkeys(("llama", "mistral"), ("k_proj", "v_proj", "down_proj")),
    **dict.fromkeys(("qwen2", "qwen3", "gemma2", "gemma3_text"), ("q_proj", "v_proj", "down_proj")),
}


def default_targets(kind: Kind, model_type: str) -> Targets | None:
    """Return what PEFT 0.21 adapts of a base; None where it wants the config to say it."""
    if kind is Kind.ADALORA and model_type == "mistral":
        return None
    return (_IA3 if kind is Kind.IA3 else _QUERY_VALUE).get(model_type)
