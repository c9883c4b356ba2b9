"""The tokenizer of a GGUF file, as ``tokenizer.json`` has it."""

from typing import Any, Final

from loramux_shared.gguf.header import GgufHeader

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens."""
_WORDS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS: Final = {"type": "Digits", "individual_digits": True}
PATTERNS: Final = {
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST,
    "llama3": _WORDS + r"\p{N}{1,3}" + _REST,
    "smaug-bpe": _WORDS + r"\p{N}{1,3}" + _REST,
    "qwen2": _WORDS + r"\p{N}" + _REST,
    "deepseek-r1-qwen": _WORDS + r"\p{N}" + _REST,
    "smollm": None,
    "refact": None,
    "gpt-2": None,
}
"""Expressions that split a text before pairs are merged, by names of llama.cpp; None: that of GPT-2."""
DIGITS_APART: Final = frozenset({"smollm", "refact"})
COMPOSED: Final = frozenset({"qwen2", "deepseek-r1-qwen"})
"""Those that compose characters first (NFC)."""
WHOLE_WORDS: Final = frozenset({"llama-bpe", "llama3"})
"""Those that take a word that is a token as it is, without merging."""
SPACE: Final = "\u2581"
MERGE_CHARS: Final = 16
"""Characters that a merge takes in ``tokenizer.json`` beside its own."""
MAX_MERGED: Final = 1 << 25
"""Characters of all merges that follow from scores; the largest vocabularies have 5e5 merges of a few."""


def tokenizer_json(header: GgufHeader) -> dict[str, Any]:
    """Return the content of ``tokenizer.json``.

    Raises:
        CheckpointInvalid: the tokenizer is not served, with what is; or it contradicts itself.
    """
    model = header.text("tokenizer.ggml.model")
    tokens = header.array("tokenizer.ggml.tokens", str)
    kinds = header.array("tokenizer.ggml.token_type", int) or [NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise header.invalid(f"{len(tokens)} tokens, and types of {len(kinds)}: they contradict each other.")
    if len(set(tokens)) != len(tokens):
        raise header.invalid("tokenizer.ggml.tokens: a token is there twice.")
    if model == "gpt2":
        parts = _byte_level(header, tokens)
    elif model == "llama":
        parts = _sentencepiece(header, tokens, kinds)
    else:
        raise header.invalid(f"the tokenizer {model!r:.80} is not supported; supported: gpt2, llama.")
    added = [
        {
            "id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind in (CONTROL, UNKNOWN),
        }
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]  # fmt: skip
    beside = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return beside | parts | {"post_processor": _begin(header, tokens, default=model == "llama")}


def _byte_level(header: GgufHeader, tokens: list[str]) -> dict[str, Any]:
    """Return a tokenizer that merges bytes."""
    name = header.text("tokenizer.ggml.pre", "default")
    if name not in PATTERNS:
        raise header.invalid(
            f"tokenizer.ggml.pre: {name!r:.80} is not supported; supported: {', '.join(PATTERNS)}. Serve the "
            "model's checkpoint in safetensors."
        )
    pattern = PATTERNS[name]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    steps: list[Any] = [_DIGITS] if name in DIGITS_APART else []
    if pattern is not None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        steps.append(split)
    merges = [merge.partition(" ")[::2] for merge in header.array("tokenizer.ggml.merges", str)]
    if not merges:
        raise header.invalid("tokenizer.ggml.merges: expected the merges of the tokenizer gpt2, found none.")
    vocab = {token: number for number, token in enumerate(tokens)}
    lost = next((pair for pair in merges if not {*pair, "".join(pair)} <= vocab.keys()), None)
    if lost is not None:
        raise header.invalid(f"tokenizer.ggml.merges: {' '.join(lost)!r} merges what is no token.")
    return {
        "normalizer": {"type": "NFC"} if name in COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, level]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocab, merges) | {"ignore_merges": name in WHOLE_WORDS},
    }


def _sentencepiece(header: GgufHeader, tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    """Return a tokenizer whose merges follow from the scores of its tokens: the best pair is the best token."""
    scores = header.array("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise header.invalid(f"{len(tokens)} tokens, and scores of {len(scores)}: they contradict each other.")
    vocab = {token: number for number, token in enumerate(tokens)}
    pairs, left_over = [], MAX_MERGED
    for number, token in enumerate(tokens):
        if kinds[number] not in (NORMAL, USER_DEFINED):
            continue
        for at in range(1, len(token)):
            left, right = vocab.get(token[:at]), vocab.get(token[at:])
            if left is not None and right is not None:
                pairs.append((-scores[number], left, right))
                left_over -= len(token) + MERGE_CHARS
        if left_over < 0:
            raise header.invalid("tokenizer.ggml.tokens: more merges than any vocabulary has: it is damaged.")
    merges = [(tokens[left], tokens[right]) for _, left, right in sorted(pairs)]
    spaces = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    if header.fields.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, {"type": "Prepend", "prepend": SPACE})
    back = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if len(spaces) > 1:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    falls_back = BYTE in kinds
    return {
        "normalizer": {"type": "Sequence", "normalizers": spaces},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": _bpe(vocab, merges) | {"unk_token": unknown, "fuse_unk": True, "byte_fallback": falls_back},
    }


def _bpe(vocab: dict[str, int], merges: list[Any]) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": vocab, "merges": [list(merge) for merge in merges],
    }  # fmt: skip


def _begin(header: GgufHeader, tokens: list[str], *, default: bool) -> dict[str, Any] | None:
    """Return what puts the token of the beginning before a text; None where nothing does."""
    number = header.fields.get("tokenizer.ggml.bos_token_id")
    adds = header.fields.get("tokenizer.ggml.add_bos_token", default)
    if not adds or type(number) is not int or not 0 <= number < len(tokens):
        return None
    token = tokens[number]
    first = [{"SpecialToken": {"id": token, "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": [*first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [*first, *({"Sequence": {"id": name, "type_id": 0}} for name in "AB")],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
