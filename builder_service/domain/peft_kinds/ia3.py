"""IA3 (arXiv 2205.05638), which has scales of outputs and no A and B."""

from typing import Final

from builder_service.domain.peft_kinds.kind import PeftKind

IA3: Final = PeftKind(
    "IA3",
    own_fields=("feedforward_modules", "init_ia3_weights", "lora_alpha"),
    targets={
        **dict.fromkeys(("llama", "mistral"), ("k_proj", "v_proj", "down_proj")),
        **dict.fromkeys(
            ("llama4", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), ("q_proj", "v_proj", "down_proj")
        ),
        "mixtral": ("k_proj", "v_proj", "w2"),
        "gpt_neox": ("query_key_value", "dense_4h_to_h"),
        "phi": ("q_proj", "v_proj", "fc2"),
        **dict.fromkeys(("bert", "roberta"), ("key", "value", "output.dense")),
        "deberta-v2": ("key_proj", "value_proj", "output.dense"),
    },
    mark=".ia3_l",
)
