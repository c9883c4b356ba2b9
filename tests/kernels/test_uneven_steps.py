"""Recorded steps of layers that differ in their heads and windows, and of adapters with tables of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma4TextConfig

from tests.kernels.recorded import check_recorded_steps
from tests.support.tiny import SIZES, VOCAB

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels tell of themselves when interpreted")

CONFIG = Gemma4TextConfig(
    **SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
    layer_types=["sliding_attention", "full_attention"],
    head_dim=16,
    global_head_dim=32,
    attention_k_eq_v=True,
    num_global_key_value_heads=2,
    sliding_window=12,
    hidden_size_per_layer_input=4,
    vocab_size_per_layer_input=VOCAB,
)
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"r": 3, "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj", "per_layer_projection"]},
    "own": {"r": 3, "lora_alpha": 9, "target_modules": ["embed_tokens", "lm_head"]},
}
REQUESTS = [("all", list(range(5, 24))), ("base", [9, 8, 7]), ("own", [5, 6, 7])]


@pytest.mark.sweep
def test_recorded_steps_answer_as_transformers_and_compile_nothing(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables for each way to cut and each window, filled again for prompts in chunks and for decoding.

    Tokens in flight of an adapter with embeddings and a head are embedded on the device.
    """
    folder = tmp_path_factory.mktemp("uneven")
    check_recorded_steps(folder, CONFIG, ADAPTERS, REQUESTS, monkeypatch)
