"""The bases as folders that servers open: weights, a tokenizer, and what a model with images asks for."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.golden.servers.reference import base_of
from tests.support.adapters import VOCAB

_SPECIAL = {
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "image_token": "<image>",
}
_NEWLINES = tuple("\n" * count for count in (1, 2, 3, 4))
"""Gemma's processor asks for them."""
_TOKENS = ("<unk>", "<bos>", "<eos>", *_SPECIAL.values(), *_NEWLINES)


def write_base(name: str, folder: Path) -> Path:
    """Write a base."""
    model = base_of(name)
    model.save_pretrained(folder)
    words = [*_TOKENS, *(f"w{number}" for number in range(VOCAB - len(_TOKENS)))]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token=_TOKENS[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token=_TOKENS[0], bos_token=_TOKENS[1], eos_token=_TOKENS[2],
        extra_special_tokens=_SPECIAL,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if "vision_config" in config:
        (folder / "preprocessor_config.json").write_text(
            json.dumps({"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}})
        )
        (folder / "processor_config.json").write_text(
            json.dumps({"image_seq_length": 4, "processor_class": "Gemma3Processor"})
        )
        weights = load_file(folder / "model.safetensors")
        save_file(
            {_checkpoint_name(key): value for key, value in weights.items()}, folder / "model.safetensors"
        )
        config |= {"boi_token_index": 3, "eoi_token_index": 4, "image_token_index": 5}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def _checkpoint_name(key: str) -> str:
    """Return the name that checkpoints of the hub have for a tensor: newer transformers leave a word out."""
    return key.replace("vision_tower.", "vision_tower.vision_model.").replace(
        "vision_model.vision_model", "vision_model"
    )
