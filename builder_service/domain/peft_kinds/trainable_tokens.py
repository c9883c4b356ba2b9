"""Trainable tokens: rows of embeddings and of a head in place of the base's, and nothing else.

All modules have rows of the same tokens. Those of embeddings are also the head's where the base ties the two.
"""

from typing import Final

from builder_service.domain.peft_kinds.kind import Fields, PeftKind

NAMES: Final = ("embed_tokens", "lm_head")


def _lora_fields(fields: Fields) -> Fields:
    indices, targets = fields.get("token_indices"), fields.get("target_modules")
    return {
        "trainable_token_indices": dict.fromkeys(NAMES, [] if indices is None else indices),
        "target_modules": [NAMES[0]] if targets is None else targets,
    }


TRAINABLE_TOKENS: Final = PeftKind(
    "TRAINABLE_TOKENS", own_fields=("token_indices", "init_weights"), lora_fields=_lora_fields, targets={}
)
