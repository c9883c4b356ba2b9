"""LoRA (arXiv 2106.09685)."""

from typing import Final

from builder_service.domain.peft_kinds.kind import PeftKind

LORA: Final = PeftKind("LORA", mark=".lora_")
