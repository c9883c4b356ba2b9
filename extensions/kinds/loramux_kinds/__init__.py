"""The extension `kinds`: adapters that are a LoRA in disguise, as A and B; and DoRA of embeddings and head."""

from loramux_kinds.dora_tables import with_dora_tables
from loramux_kinds.expansion import expanded
from loramux_kinds.initial import with_initial

__all__ = ["expanded", "with_dora_tables", "with_initial"]
