"""Texts that are too long for an encoder, without their ends, as transformers truncates them."""

from tokenizers import Tokenizer


def encode_shortened(
    tokenizer: Tokenizer, texts: tuple[str, ...], most: int, *, add_special_tokens: bool
) -> tuple[list[int], list[int]]:
    """Return the tokens of one or two texts, so many at most with the special ones, and their types."""
    parts = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    special = tokenizer.num_special_tokens_to_add(len(parts) > 1) if add_special_tokens else 0
    for part, length in zip(parts, shortened([*map(len, parts)], max(0, most - special)), strict=True):
        part.truncate(length)
    pair = parts[1] if len(parts) > 1 else None
    encoding = tokenizer.post_process(parts[0], pair, add_special_tokens)
    return encoding.ids, encoding.type_ids


def shortened(lengths: list[int], most: int) -> list[int]:
    """Return the lengths that texts have when the longer one is cut first until both have so many tokens."""
    if len(lengths) == 1:
        return [min(lengths[0], most)]
    short, long = sorted(lengths)
    if short + long > most:
        short = min(short, most // 2)
        long = most - short
    return [short, long] if lengths[0] <= lengths[1] else [long, short]
