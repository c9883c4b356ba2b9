"""The extension `kinds`: adapters that are a LoRA in disguise, as A and B; their truncation to lower ranks."""

from loramux_kinds.dora_tables import with_dora_tables
from loramux_kinds.expansion import expanded
from loramux_kinds.initial import with_initial
from loramux_kinds.truncation import truncate_adapter

__all__ = ["expanded", "truncate_adapter", "with_dora_tables", "with_initial"]
