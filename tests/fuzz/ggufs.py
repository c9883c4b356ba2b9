"""GGUF files of a few kilobytes, drawn with numbers, types and names of their own, and what is read of them."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np

from builder_service.domain.gguf_tensors import read_tensors
from builder_service.domain.rules.checked import Rulebook
from builder_service.domain.rules.tensors import AdapterLimits
from builder_service.pipeline import gguf_files
from inference_service.engine.models.gguf import names_of, read_gguf
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.read import read_fields
from loramux_shared.deployment import Dtype
from loramux_shared.gguf.files import small_files
from loramux_shared.gguf.header import ALIGNMENT, ARRAY, FREQUENCIES, NUMBERS, SIZES, TEXT, TYPES, read_header
from loramux_shared.gguf.tokenizer import SPACE
from loramux_shared.untrusted_json import parse_strict_json
from tests.fuzz.mutate import NUMBERS as LIMITS, TEXTS, check_findings, mutations

HIDDEN: Final = 32
UINT, FLOAT = 4, 6
TOKENS: Final = ["h", "e", "he", "<|0|>", "<|1|>"]
PIECES: Final = ["<unk>", "<s>", "<0x00>", SPACE, "h", "e", "he"]
Entry = tuple[str, int, Any]
"""Key, type and value of metadata; an array's value is (type, values)."""
Place = tuple[str, tuple[int, ...], int, int]
"""Name, sizes (columns first), type and offset of a tensor."""


@dataclass(frozen=True)
class GgufParts:
    """The parts of a file."""

    entries: tuple[Entry, ...]
    places: tuple[Place, ...]
    data: bytes
    """Bytes of its tensors."""

    def pack(self) -> bytes:
        """Return the file."""
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.places), len(self.entries))
        for key, kind, value in self.entries:
            head += _text(key) + struct.pack("<I", kind) + _value(kind, value)
        for name, sizes, kind, offset in self.places:
            dims = struct.pack(f"<I{len(sizes)}Q", len(sizes), *(size % 2**64 for size in sizes))
            head += _text(name) + dims + struct.pack("<IQ", kind % 2**32, offset % 2**64)
        return head + bytes(-len(head) % ALIGNMENT) + self.data


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value: Any) -> bytes:
    if kind == TEXT:
        return _text(str(value))
    if kind == ARRAY:
        inner, values = value
        return struct.pack("<IQ", inner, len(values)) + b"".join(_value(inner, each) for each in values)
    form = NUMBERS.get(kind, "I")
    if form in "fd":
        with np.errstate(over="ignore"):
            wide = float(np.clip(value, -1.7e308, 1.7e308)) if isinstance(value, int) else value
            return np.array(wide, f"<{form}").tobytes()
    size, whole = struct.calcsize(f"<{form}"), int(value) if value == value and abs(value) < 2**70 else 0
    return (whole % 2 ** (8 * size)).to_bytes(size, "little")


def _parts(arch: str, tokens: list[str], model: str, *more: Entry) -> GgufParts:
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": HIDDEN, "feed_forward_length": HIDDEN}
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2}
    entries: tuple[Entry, ...] = (
        ("general.architecture", TEXT, arch),
        *((f"{arch}.{key}", UINT, size) for key, size in sizes.items()),
        (f"{arch}.attention.layer_norm_rms_epsilon", FLOAT, 1e-5),
        (f"{arch}.rope.freq_base", FLOAT, 10000.0),
        ("tokenizer.ggml.model", TEXT, model),
        ("tokenizer.ggml.tokens", ARRAY, (TEXT, tokens)),
        ("tokenizer.ggml.token_type", ARRAY, (5, [1 if len(token) < 3 else 3 for token in tokens])),
        ("tokenizer.ggml.bos_token_id", UINT, 1),
        *more,
    )
    matrices = {"token_embd": (HIDDEN, len(tokens)), "blk.0.attn_q": (HIDDEN, 8), "blk.0.attn_k": (HIDDEN, 4)}
    places, end = [], 0
    for name, shape in matrices.items():
        places.append((f"{name}.weight", shape, 8, end))
        end += shape[0] // 32 * 34 * shape[1]
    return GgufParts(entries, (*places, ("output_norm.weight", (HIDDEN,), 0, end)), bytes(end + 4 * HIDDEN))


def _with_factors(parts: GgufParts) -> GgufParts:
    factors = struct.pack("<4f", 1, 1, 1, 1)
    return replace(
        parts, places=(*parts.places, (FREQUENCIES, (4,), 0, len(parts.data))), data=parts.data + factors
    )


_MERGES: Final = ("tokenizer.ggml.merges", ARRAY, (TEXT, ["h e"]))
_GPT2: Final = ("tokenizer.ggml.pre", TEXT, "smollm")
PARTS: Final = (
    _parts("llama", TOKENS, "gpt2", _GPT2, _MERGES, ("tokenizer.chat_template", TEXT, "{{ messages }}")),
    _with_factors(_parts("llama", TOKENS, "gpt2", _GPT2, _MERGES, ("general.license", TEXT, "mit"))),
    _parts("qwen3", TOKENS, "gpt2", ("tokenizer.ggml.pre", TEXT, "qwen2"), _MERGES,
           ("qwen3.rope.scaling.type", TEXT, "yarn"), ("qwen3.rope.scaling.factor", FLOAT, 4.0)),
    _parts("llama", PIECES, "llama", ("tokenizer.ggml.scores", ARRAY, (FLOAT, [-1.0] * len(PIECES))),
           ("tokenizer.ggml.eos_token_id", UINT, 2), ("llama.attention.key_length", UINT, 8)),
)  # fmt: skip
LORA: Final = GgufParts(
    (("general.architecture", TEXT, "llama"), ("general.type", TEXT, "adapter"), ("adapter.type", TEXT, "lora"),
     ("adapter.lora.alpha", FLOAT, 8.0), ("adapter.alora.invocation_tokens", ARRAY, (UINT, [1, 2]))),
    (("blk.0.attn_q.weight.lora_a", (HIDDEN, 4), 0, 0), ("blk.0.attn_q.weight.lora_b", (4, HIDDEN), 0, 512),
     ("blk.0.attn_k.weight.lora_a", (HIDDEN, 4), 8, 1024), ("blk.0.attn_k.weight.lora_b", (4, 16), 1, 1184)),
    bytes(1312),
)  # fmt: skip
"""An adapter of the model, with a type of blocks and half of the keys' heads."""
KEYS: Final = (
    "general.alignment", "split.count", "llama.attention.key_length", "llama.rope.dimension_count",
    "llama.attention.value_length", "tokenizer.ggml.add_bos_token", "llama.expert_count",
    "tokenizer.ggml.padding_token_id", "llama.rope.scaling.original_context_length",
)  # fmt: skip
NAMES: Final = (
    "rope_freqs.weight", "x", "weight", "blk.0.attn_q.weight", "blk.0.weight", "output.weight", "output.bias",
    "blk.0.ffn_down.bias", "blk..attn_q.weight", "token_embd.weight", "blk.1.attn_k.bias",
    "token_embd.weight.lora_a", "blk.0.attn_norm.weight", "output.weight.lora_b", "blk.00.attn_q.weight.lora_b",
)  # fmt: skip
SHAPES: Final = (
    (0,), (0, 0), (2**63, 0), (0, 2**63), (2**32, 2**32), (2**64 - 1,) * 4, (), (1, 1, 1, 1), (1,) * 5,
    (32, 0), (32, 1), (32, 2**59),
)  # fmt: skip


def seeds() -> list[bytes]:
    """Return valid files."""
    return [parts.pack() for parts in PARTS]


def drawn(rng: Random, seeds: Sequence[GgufParts] = PARTS) -> bytes:
    """Return a file that says something else in one to three places, or has other bytes."""
    parts = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 2, 3))):
        change = rng.choice((_other_entry, _other_entry, _other_place))
        parts = change(parts, rng)
    return parts.pack() if rng.random() < 0.8 else mutations(parts.pack(), rng)


def _other_entry(parts: GgufParts, rng: Random) -> GgufParts:
    entries = list(parts.entries)
    at = rng.randrange(len(entries))
    key, kind, value = entries[at]
    match rng.randrange(8):
        case 0:
            del entries[at]
        case 1:
            entries[at:at] = [entries[at]]
        case 2:
            entries.append((rng.choice(KEYS), rng.choice((*NUMBERS,)), rng.choice(LIMITS)))
        case 3 if kind == ARRAY and value[1] and value[0] != ARRAY:
            inner, values = value
            few = list(values)
            few[rng.randrange(len(few))] = rng.choice(TEXTS if inner == TEXT else LIMITS)
            entries[at] = key, kind, (inner, rng.choice((few, values[:-1], [*values, values[0]], [])))
        case 4:
            entries[at] = (
                key,
                ARRAY,
                rng.choice(((TEXT, ["a"]), (FLOAT, [float("nan")]), (ARRAY, [(UINT, [1])]))),
            )
        case 5:
            entries[at] = key, TEXT, rng.choice(TEXTS)
        case _:
            entries[at] = key, rng.choice((*NUMBERS,)), rng.choice(LIMITS)
    return replace(parts, entries=tuple(entries))


def _other_place(parts: GgufParts, rng: Random) -> GgufParts:
    places = list(parts.places)
    at = rng.randrange(len(places))
    name, sizes, kind, offset = places[at]
    match rng.randrange(6):
        case 0:
            del places[at]
        case 1:
            places.append((rng.choice(NAMES), rng.choice(SHAPES), rng.choice((0, 1, 8)), len(parts.data)))
        case 2:
            places[at] = rng.choice((*NAMES, *TEXTS)), sizes, kind, offset
        case 3:
            places[at] = name, rng.choice(SHAPES), kind, offset
        case 4:
            places[at] = name, sizes, rng.choice((*TYPES, 99)), offset
        case _:
            places[at] = name, sizes, kind, int(rng.choice(LIMITS[:13]))
    return replace(parts, places=tuple(places))


def judge(path: Path) -> None:
    """Read a file as a builder and a replica do; raise CheckpointInvalid for one that is not served.

    What is written of it is JSON that has one meaning, describes a base that is served or refused by name, and
    each tensor has the bytes that its place says.
    """
    header = read_header(path)
    names = names_of(path)
    whole = read_tensors(path)
    shard = read_gguf(path)
    assert set(shard.tensors) == set(names)
    assert whole.tensors.keys() <= shard.tensors.keys()
    for place in header.tensors.values():
        assert place.type in SIZES
        assert 0 <= place.offset <= place.offset + place.num_bytes <= path.stat().st_size
    files = small_files(header)
    found = {name: parse_strict_json(text.encode()) for name, text in files.items() if name.endswith(".json")}
    assert all(json.dumps(each, allow_nan=False) for each in found.values())
    read_fields(found["config.json"], found["generation_config.json"])


def judge_adapter(path: Path, model: ModelConfig) -> str:
    """Check a file as an adapter of a model; all that it says has a meaning, or a finding with a code."""
    rules = Rulebook(AdapterLimits(model, 64, frozenset()), (model.architecture,), Dtype.FLOAT32)
    checked = gguf_files.check(path.parent, rules, lambda _: None)
    check_findings(checked.findings, 0)
    for row in checked.rows:
        assert checked.file is not None
        assert checked.file.read(row.a).shape == (row.row.rank, row.row.in_features)
    return "refused" if checked.errors else "accepted"


def model() -> ModelConfig:
    """Return the model that the adapter is of."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": 1, "vocab_size": 5}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "architectures": ["LlamaForCausalLM"]}
    return read_fields(sizes | heads, None)
