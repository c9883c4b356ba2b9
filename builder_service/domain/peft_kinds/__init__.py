"""The kinds of PEFT's adapters that amount to LoRA, a file each; `domain/kinds.py` collects them."""
