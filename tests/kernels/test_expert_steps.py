"""Recorded steps of a mixture of experts: routed again at every replay, with adapters of experts beside the
base.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from tests.kernels.recorded import check_recorded_steps
from tests.support.tiny import SIZES

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels tell of themselves when interpreted")

CONFIG = Qwen3MoeConfig(
    **SIZES | {"num_hidden_layers": 1},
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    norm_topk_prob=True,
)
SINKS = GptOssConfig(
    **SIZES, head_dim=16, num_local_experts=5, num_experts_per_tok=2, sliding_window=12, pad_token_id=0
)
ADAPTERS: dict[str, dict[str, Any]] = {
    "experts": {
        "r": 3,
        "target_modules": ["o_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    "attention": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
}
REQUESTS = [
    ("experts", list(range(5, 24))),
    ("base", [9, 8, 7]),
    ("attention", [30, 31]),
    ("attention*2 + experts*-1.5", [9, 8, 7]),
]


@pytest.mark.parametrize(
    "config", [CONFIG, pytest.param(SINKS, marks=pytest.mark.sweep)], ids=["qwen3-moe", "gpt-oss"]
)
def test_recorded_steps_answer_as_transformers_and_compile_nothing(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, config: PreTrainedConfig
) -> None:
    """Requests after the recording in any order answer the same: prompts in chunks, beside decoding and
    alone.
    """
    folder = tmp_path_factory.mktemp("mixture")
    check_recorded_steps(folder, config, ADAPTERS, REQUESTS, monkeypatch)
