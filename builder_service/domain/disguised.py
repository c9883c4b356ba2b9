"""The extension `kinds`: adapters that are a LoRA in disguise, as A and B; their truncation to lower ranks."""

from builder_service.domain.dora_tables import with_dora_tables
from builder_service.domain.expansion import expanded
from builder_service.domain.initial import with_initial
from builder_service.domain.truncation import truncate_adapter

__all__ = ["expanded", "truncate_adapter", "with_dora_tables", "with_initial"]
