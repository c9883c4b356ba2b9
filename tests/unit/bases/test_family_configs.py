"""Configs of the families of this extension; tests of all families have their answers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, DeepseekV3Config

from inference_service.engine.backends.operations import Operations
from inference_service.engine.kernels.experts import ByExpert, Routed
from inference_service.engine.models.blocks import Cache, Step
from inference_service.engine.models.checkpoint import Checkpoint
from inference_service.engine.models.decoder import Decoder, _query_factors
from inference_service.engine.models.experts import ExpertsBlock
from inference_service.engine.models.family_blocks import route
from loramux_shared.bases.family_layers import RoutedLayer
from loramux_shared.bases.read import read_config, read_fields
from loramux_shared.bases.rope import LongRope, QueryScaling
from loramux_shared.faults import CheckpointInvalid
from tests.models.test_families import CASES
from tests.support.cases import cases
from tests.support.tiny import make_checkpoint

CPU = torch.device("cpu")
HUB: dict[str, dict[str, Any]] = cases(__file__, "HUB")


class NotedRoutes(Operations):
    """Operations that note the experts of the last rows."""

    def by_expert(self, routed: Routed, num_experts: int) -> ByExpert:
        self.ids = routed.ids
        return super().by_expert(routed, num_experts)


def step_of(operations: Operations) -> Step:
    """Return a step of no sequence, for blocks that compute each row by itself."""
    attention = operations.attention((), 16, ())
    return Step(operations, attention, Cache((), ()), None, (), None)


@pytest.mark.parametrize("name", HUB)
def test_configs_mean_what_transformers_takes_them_for(tmp_path: Path, name: str) -> None:
    """A config of the hub, and the same config as transformers writes it, are the same model."""
    (tmp_path / "config.json").write_text(json.dumps(HUB[name]))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "full")
    for max_seq_len in (None, 8192):
        assert read_config(tmp_path, max_seq_len) == read_config(tmp_path / "full", max_seq_len)


def test_kimi_k2_is_a_deepseek_v3_under_another_name() -> None:
    """Checkpoints bring code of their own for a type that transformers takes for DeepSeek V3."""
    assert read_fields(HUB["Kimi-K2"] | {"model_type": "kimi_k2"}) == read_fields(HUB["Kimi-K2"])


def test_llama_4_chooses_before_a_sigmoid_and_scales_behind_the_last_position() -> None:
    """Close scores far above 0 are apart, and the last position may begin another step of the scaling."""
    spec = RoutedLayer(2, 1, 8, renormalised=False, scales_inputs=True)
    assert route(torch.tensor([[40.0, 41.0]]), spec, None).ids.tolist() == [[1]]
    assert [read_fields(HUB["Llama-4-Scout"], {}, longest).windows[0] for longest in (8192, 8193)] == [
        None,
        8192,
    ]
    assert len(_query_factors(QueryScaling(0.1, 8, ahead=1), 16)) == 3


def test_phi_has_its_long_factors_beyond_its_first_length() -> None:
    """A deployment of longer sequences has the long factors, and their magnitude."""
    block = HUB["Phi-3.5-MoE"]["rope_scaling"]
    for longest, kind in ((4096, "short"), (4097, "long")):
        rope = read_fields(HUB["Phi-3.5-MoE"], {}, longest).ropes[0]
        assert rope.scaling == LongRope(tuple(block[f"{kind}_factor"]), block[f"{kind}_mscale"])


def test_experts_of_qwen_3_vl_are_read_as_the_hub_has_them(tmp_path: Path) -> None:
    """The hub's files have weights [experts, in, out], those of transformers 5 [experts, out, in]."""
    config = CASES["qwen3-vl-moe"].config
    make_checkpoint(tmp_path, config)
    file, base, answers = tmp_path / "model.safetensors", read_config(tmp_path), []
    operations, x = Operations(torch.float32, CPU), torch.randn(64, base.dims.hidden)
    for _ in range(2):
        block = Decoder(base, Checkpoint(tmp_path, torch.float32, CPU)).layers[0].mlp
        assert isinstance(block, ExpertsBlock)
        answers.append(block(step_of(operations), x))
        tensors = {n: t.mT.contiguous() if ".experts." in n else t for n, t in load_file(file).items()}
        save_file(tensors, file)
    assert torch.equal(*answers)


@pytest.mark.parametrize(("name", "change", "expected"), cases(__file__, "REFUSED"))
def test_switches_that_are_not_served_are_refused(name: str, change: dict[str, Any], expected: str) -> None:
    """A switch that would change answers is named."""
    with pytest.raises(CheckpointInvalid, match=expected):
        read_fields(HUB[name] | change)


def test_a_router_keeps_the_bits_of_its_bias(tmp_path: Path) -> None:
    """Biases that are stored in float32 decide between close scores, whatever a replica computes in."""
    config = CASES["deepseek-v3"].config
    assert isinstance(config, DeepseekV3Config)
    make_checkpoint(tmp_path, config)
    file, gate = tmp_path / "model.safetensors", "model.layers.1.mlp.gate"
    tensors = load_file(file)
    tensors[f"{gate}.weight"].zero_()
    bias = tensors[f"{gate}.e_score_correction_bias"]
    torch.add(1, torch.arange(len(bias)) * 2**-12, out=bias)
    save_file(tensors, file)
    base, noted = read_config(tmp_path), NotedRoutes(torch.bfloat16, CPU)
    block = Decoder(base, Checkpoint(tmp_path, torch.bfloat16, CPU), noted).layers[1].mlp
    block(step_of(noted), torch.randn(1, base.dims.hidden, dtype=torch.bfloat16))
    spec = base.layers[1].mlp
    assert isinstance(spec, RoutedLayer)
    assert torch.equal(noted.ids, route(torch.zeros(1, len(bias)), spec, bias).ids)
    assert not torch.equal(noted.ids, route(torch.zeros(1, len(bias)), spec, bias.bfloat16()).ids)
