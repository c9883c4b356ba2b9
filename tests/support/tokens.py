"""A tokenizer for services without a model, or with a tiny one."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 199


def write_tokenizer(folder: Path) -> None:
    """Save a tokenizer of one token per byte-like piece."""
    vocab = {f"<{index}>": index for index in range(3)} | {chr(32 + i): 3 + i for i in range(VOCAB - 3)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<0>"))  # noqa: S106 - a token of text
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
