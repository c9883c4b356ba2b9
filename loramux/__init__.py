"""loramux: one base model, hundreds of LoRA adapters, one server."""
