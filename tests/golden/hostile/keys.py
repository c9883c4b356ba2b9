"""Tensors: keys that mean something else, shapes of other bases, values that cannot be stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.golden.hostile.exhibit import (
    ROOT,
    WEIGHTS,
    Exhibit,
    adapter,
    embeddings,
    exhibit,
    of_tensors,
    plus,
)
from tests.golden.wild.bases import BASES
from tests.support.adapters import HIDDEN, INTERMEDIATE, VOCAB, Tensors, key, tensors

HEAD, EMBED = "base_model.model.lm_head", f"{ROOT}embed_tokens"
SCORE = "base_model.model.score.weight"
Q, MLP = f"{ROOT}layers.0.self_attn.q_proj", f"{ROOT}layers.0.mlp"


def _one(name: str, codes: str, tensor: str, shape: tuple[int, ...] = (4, 16)) -> Exhibit:
    return of_tensors(name, codes, lambda: plus(tensor, shape))


def _renamed(name: str, codes: str, old: str, new: str) -> Exhibit:
    return of_tensors(name, codes, lambda: {k.replace(old, new): v for k, v in tensors().items()})


def _changed(name: str, codes: str, change: Any, **settings: Any) -> Exhibit:
    """Return an exhibit with a change in a value, or in all, of layer 0's A of q_proj."""

    def make() -> Tensors:
        made: dict[str, Any] = dict(tensors())
        made[key(0, "q_proj", "A")] = change(made[key(0, "q_proj", "A")].copy())
        return made

    return of_tensors(name, codes, make, **settings)


def _set(value: float) -> Any:
    def change(matrix: Any) -> Any:
        matrix[1, 2] = value
        return matrix

    return change


def _magnitudes(width: int) -> Any:
    """Return a function that writes magnitudes of this length for q_proj of layer 0 alone."""

    def make(folder: Path) -> None:
        adapter(folder, target_modules=["q_proj"], use_dora=True)
        made = {name: values for name, values in tensors().items() if name.startswith(f"{Q}.")}
        save_file({**made, f"{Q}.lora_magnitude_vector": np.ones(width, "f4")}, folder / WEIGHTS)

    return make


def _saved(values: Any, *keys: str) -> Any:
    def make(folder: Path) -> None:
        adapter(folder, modules_to_save=["embed_tokens"])
        save_file({**tensors(), **{name: values() for name in keys}}, folder / WEIGHTS)

    return make


def _without(name: str) -> Tensors:
    return {k: v for k, v in tensors().items() if k != name}


def _zero(side: str) -> Tensors:
    return {k: np.zeros_like(v) if f"lora_{side}" in k else v for k, v in tensors().items()}


def _wide_o_proj() -> Tensors:
    return {key(0, "o_proj", "A"): np.ones((4, 16), "f2"), key(0, "o_proj", "B"): np.ones((32, 4), "f2")}


_TOWER = "base_model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"

_TARGETS = ["q_proj", "v_proj", "embed_tokens", "lm_head"]


def _of_none(
    name: str, codes: str, *shapes: tuple[int, int], targets: Any = _TARGETS, **config: Any
) -> Exhibit:
    """A and B of embeddings, or with four shapes of the head as well."""
    names = [f"{EMBED}.lora_embedding_A", f"{EMBED}.lora_embedding_B", f"{HEAD}.lora_A.weight"]
    found = zip([*names, f"{HEAD}.lora_B.weight"], shapes, strict=False)
    made = tensors() | {key: np.ones(shape, "f2") for key, shape in found}
    return exhibit(name, codes, lambda folder: adapter(folder, made, target_modules=targets, **config))


def _tokens(name: str, codes: str, indices: Any, shape: tuple[int, int], **config: Any) -> Exhibit:
    made = tensors() | {f"{EMBED}.token_adapter.trainable_tokens_delta": np.ones(shape, "f2")}
    config = {"trainable_token_indices": indices} | config
    return exhibit(name, codes, lambda folder: adapter(folder, made, **config))


def _classifier(name: str, codes: str, *, values: Any = None, key: str = SCORE, **config: Any) -> Exhibit:
    """An adapter that was trained to classify, with a head."""
    head = np.ones((3, HIDDEN), "f4") if values is None else values
    config = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]} | config
    return exhibit(name, codes, lambda folder: adapter(folder, tensors() | {key: head}, **config))


REFUSED = (
    of_tensors("no tensors", "E_EMPTY_WEIGHTS", dict),
    _classifier("a score head of another base", "E_TASK", values=np.ones((3, HIDDEN + 1), "f4")),
    _classifier("a score head of 1,025 labels", "E_TASK", values=np.ones((1025, HIDDEN), "f4")),
    _classifier("a score head of one dimension", "E_TASK", values=np.ones(HIDDEN, "f4")),
    _classifier("a score head in int8", "E_TASK", values=np.ones((3, HIDDEN), "i1")),
    _classifier("a score head that is NaN", "E_NAN", values=np.full((3, HIDDEN), np.nan, "f4")),
    _classifier("a score head without elements", "E_TASK", values=np.ones((0, HIDDEN), "f4")),
    _classifier("a bias of a score head alone", "E_TASK", values=np.ones(3, "f4"), key=f"{SCORE[:-6]}bias"),
    _classifier("a classifier that acts from tokens on", "E_ALORA", alora_invocation_tokens=[1]),
    _classifier("a score head of no classifier", "E_EMBED", task_type="CAUSAL_LM", modules_to_save=["score"]),
    _one("LoRA of a score head", "E_UNKNOWN_KEY", "base_model.model.score.lora_A.weight"),
    exhibit("no tensors and no targets", "E_EMPTY_TARGETS", lambda at: adapter(at, {}, target_modules=[])),
    of_tensors("ZeRO-3", "E_EMPTY_WEIGHTS", lambda: {k: np.zeros((0,), "f2") for k in tensors()}),
    of_tensors("tensors with a dimension of zero", "E_EMPTY_WEIGHTS",
               lambda: plus(key(0, "o_proj", "A"), (0, 16), pair=(16, 0))),
    _one("an unknown key", "E_UNKNOWN_KEY", "something.else"),
    _one("an empty key", "E_UNKNOWN_KEY", ""),
    _one("a key of a million dots", "E_UNKNOWN_KEY", f"{ROOT}{'layers.0.' * 100_000}x.lora_A.weight."),
    _renamed("no root", "E_UNKNOWN_KEY", "base_model.model.", ""),
    _renamed("no layer", "E_UNKNOWN_KEY", "layers.0.", "layers.x."),
    _renamed("negative layer", "E_UNKNOWN_KEY", "layers.0.", "layers.-1."),
    of_tensors("two adapters", "E_ADAPTER_INFIX",
               lambda: plus(key(1, "o_proj", "A").replace("_A", "_A.second"), pair=(16, 4))),
    _one("vision tower", "E_PREFIX", _TOWER),
    _one("blocks of a tower", "E_PREFIX", f"{ROOT}visual.blocks.0.attn.qkv.lora_A.weight"),
    _one("audio tower", "E_PREFIX", "base_model.model.audio_tower.layers.0.self_attn.q_proj.lora_A.weight"),
    _one("encoder", "E_PREFIX", f"{ROOT}encoder.layers.0.self_attn.q_proj.lora_A.weight"),
    _one("fused where the base is not", "E_MODULE", f"{ROOT}layers.0.self_attn.qkv_proj.lora_A.weight"),
    _one("q_proj of an MLP", "E_MODULE", f"{MLP}.q_proj.lora_A.weight"),
    _one("linear attention", "E_MODULE", f"{ROOT}layers.0.linear_attn.in_proj_qkvz.lora_A.weight"),
    of_tensors("beyond the ceiling", "E_MODULE", tensors, lora={"lora_target_modules": ["attn_q"]}),
    of_tensors("A alone", "E_PAIR", lambda: _without(key(1, "v_proj", "B"))),
    of_tensors("B alone", "E_PAIR", lambda: _without(key(1, "v_proj", "A"))),
    _one("A twice", "E_PAIR", key(0, "q_proj", "A", "base_model.model.language_model.model.")),
    _changed("ranks of two adapters", "E_RANK_SHAPE", lambda _: np.ones((8, 16), "f2")),
    _changed("a convolution", "E_RANK_SHAPE", lambda _: np.ones((4, 16, 1, 1), "f2")),
    _changed("a vector", "E_RANK_SHAPE", lambda _: np.ones((4,), "f2")),
    _changed("another hidden size", "E_DIMS", lambda _: np.ones((4, 20), "f2")),
    of_tensors("a deeper base", "E_LAYER", lambda: tensors(layers=3)),
    of_tensors("layer 999,999", "E_LAYER", lambda: plus(key(999_999, "q_proj", "A"), pair=(16, 4))),
    of_tensors("above the ceiling", "E_RANK_MAX", tensors, lora={"max_lora_rank": 3}),
    _of_none("A of embeddings alone", "E_PAIR", (4, VOCAB)),
    _of_none("embeddings of a larger vocabulary", "E_DIMS", (4, VOCAB + 2), (HIDDEN, 4)),
    _of_none("embeddings that are no target", "E_TARGETS", (4, VOCAB), (HIDDEN, 4), targets=_TARGETS[:2]),
    _of_none("linear is no embedding", "E_TARGETS", (4, VOCAB), (HIDDEN, 4), targets="all-linear"),
    _of_none("a rank of embeddings above the ceiling", "E_RANK_MAX", (65, VOCAB), (HIDDEN, 65),
             rank_pattern={"embed_tokens": 65}),
    of_tensors("LoRA of a tower's embeddings", "E_PREFIX",
               lambda: plus("base_model.model.tower.embed_tokens.lora_embedding_A")),
    _one("LoRA of embeddings of each layer", "E_EMBED", f"{EMBED}_per_layer.lora_embedding_A"),
    _one("embeddings as a linear", "E_EMBED", f"{EMBED}.lora_A.weight"),
    _of_none("embeddings that act from tokens on", "E_ALORA", (4, VOCAB), (HIDDEN, 4),
             alora_invocation_tokens=[3]),
    _tokens("more rows than tokens", "E_EMBED", [3, 4], (3, HIDDEN)),
    _tokens("a token beyond the vocabulary", "E_EMBED", [3, VOCAB], (2, HIDDEN)),
    _tokens("a token twice", "E_EMBED", [3, 3], (2, HIDDEN)),
    _tokens("tokens as text", "E_BAD_CONFIG E_EMBED", ["<s>"], (1, HIDDEN)),
    _tokens("tokens of the head without rows", "E_EMBED", {"embed_tokens": [3], "lm_head": [4]}, (1, HIDDEN)),
    exhibit("NaN in a saved head", "E_NAN", _saved(
        lambda: np.full((VOCAB, HIDDEN), np.nan, "f2"), f"{EMBED}.weight")),
    _one("a resized vocabulary", "E_EMBED", f"{EMBED}.weight", (VOCAB + 2, HIDDEN)),
    _one("a head by another name", "E_EMBED", f"{ROOT}unembed_tokens.lora_A.weight"),
    _one("base_layer of embeddings", "E_EMBED", f"{EMBED}.base_layer.weight", (VOCAB, HIDDEN)),
    _one("trainable tokens", "E_EMBED", f"{EMBED}.token_adapter.trainable_tokens_delta"),
    _one("modules_to_save", "E_EMBED", f"{HEAD}.modules_to_save.default.weight"),
    exhibit("embeddings in int8", "E_EMBED", _saved(lambda: embeddings().astype("i1"), f"{EMBED}.weight")),
    _one("a norm", "E_UNKNOWN_KEY", f"{ROOT}norm.weight", (HIDDEN,)),
    _one("DoRA", "E_DORA", f"{Q}.lora_magnitude_vector", (16,)),
    _one("DoRA, raw", "E_ADAPTER_INFIX", f"{Q}.lora_magnitude_vector.default.weight", (16,)),
    _one("lora_bias of a head", "E_EMBED", f"{HEAD}.lora_B.bias", (VOCAB,)),
    exhibit("DoRA of other widths", "E_DIMS", _magnitudes(17)),
    exhibit("DoRA, and no weights of the base", "E_DORA", _magnitudes(16)),
    _one("DoRA of NVlabs", "E_DORA", f"{Q}.weight_m_wdecomp.weight", (16, 1)),
    _one("bias of B", "E_BIAS", f"{Q}.lora_B.bias", (16,)),
    _one("bias of the base", "E_BIAS", f"{Q}.base_layer.bias", (16,)),
    _one("bias of an older release", "E_BIAS", f"{Q}.bias", (16,)),
    _one("bias alone", "E_BIAS", f"{ROOT}layers.0.self_attn.k_proj.bias", (8,)),
    _one("bias of a norm", "E_BIAS", f"{ROOT}norm.bias", (16,)),
    _one("VeLoRA", "E_VARIANT", f"{Q}.lora_velora_embed", (4,)),
    _one("KaSA", "E_VARIANT", f"{Q}.lora_diag"),
    _one("an expert", "E_MOE", f"{MLP}.experts.0.up_proj.lora_A.weight"),
    _one("experts", "E_MOE", f"{MLP}.experts.base_layer.lora_A.weight"),
    _one("a router", "E_MOE", f"{MLP}.gate.lora_A.weight"),
    _one("Mixtral", "E_MOE", f"{ROOT}layers.0.block_sparse_moe.experts.3.w1.lora_A.weight"),
    _one("MLX keys", "E_MLX", "model.layers.0.self_attn.q_proj.lora_a"),
    _one("torchtune keys", "E_CONTAINER", "layers.0.attn.q_proj.lora_a.weight"),
    _one("mistral keys", "E_CONTAINER", "layers.0.attention.wq.lora_A.weight"),
    _one("NeMo keys", "E_CONTAINER", "model.layers.0.self_attn.adapter_layer.lora_kqv_adapter.x.weight"),
    _one("kohya keys", "E_CONTAINER", "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"),
    _changed("NaN", "E_NAN", _set(np.nan)),
    _changed("infinite", "E_NAN", _set(np.inf)),
    of_tensors("beyond bfloat16", "E_OVERFLOW", lambda: tensors() | {
        key(0, "q_proj", "A"): np.full((4, 16), 3.4e38, "f4")}),
    of_tensors("a product beyond every type", "E_MAGNITUDE", lambda: tensors() | {
        key(0, "q_proj", "A"): np.full((4, 16), 1e20, "f4"),
        key(0, "q_proj", "B"): np.full((16, 4), 1e20, "f4")}),
    of_tensors("A beyond every type for any input", "E_MAGNITUDE", lambda: tensors() | {
        key(0, "q_proj", "A"): np.full((4, 16), 3e38, "f4")}, lora={"dtype": "float32"}),
    _changed("beyond float16", "E_OVERFLOW", _set(9.1e4), lora={"dtype": "float16"}),
    *(_changed(f"{kind} values", "E_DTYPE", lambda _, kind=kind: np.ones((4, 16), kind))
      for kind in ("i1", "f8", ml_dtypes.float8_e4m3fn)),
    of_tensors("many at once", "E_UNKNOWN_KEY E_PAIR E_DORA E_NAN", lambda: plus("x") | {
        key(1, "o_proj", "A"): np.ones((4, 16), "f2"),
        f"{Q}.lora_magnitude_vector": np.ones(16, "f2"),
        key(0, "v_proj", "B"): np.full((8, 4), np.nan, "f2"),
    }),
)  # fmt: skip

ACCEPTED = (
    _classifier("a classifier of three labels", ""),
    _classifier("a classifier, as a raw state dict names its head", "",
                key="base_model.model.score.modules_to_save.default.weight"),
    _of_none("LoRA of embeddings and head", "", (4, VOCAB), (HIDDEN, 4), (4, HIDDEN), (VOCAB, 4)),
    _one("a head", "", f"{HEAD}.weight", (VOCAB, HIDDEN)),
    exhibit("trained embeddings", "", _saved(lambda: 2 * embeddings(), f"{EMBED}.weight")),
    exhibit("embeddings of minus zero", "", _saved(lambda: -embeddings(), f"{EMBED}.weight")),
    _tokens("trained tokens", "", {"embed_tokens": [30, 4]}, (2, HIDDEN)),
    exhibit("embeddings and nothing else", "W_TARGETS", lambda folder: adapter(
        folder, {f"{EMBED}.weight": np.ones((VOCAB, HIDDEN), "f2")}, modules_to_save=["embed_tokens"])),
    of_tensors("B is zero", "W_ZERO_B", lambda: _zero("B")),
    of_tensors("A is zero", "W_ZERO_B", lambda: _zero("A")),
    of_tensors("a product that drowns the base", "W_MAGNITUDE", lambda: tensors() | {
        key(1, "v_proj", "A"): np.full((4, 16), 1e4, "f4")}, lora={"dtype": "float32"}),
    of_tensors("cut to rank 2", "W_TRUNCATED", tensors, lora={"truncate_to_rank": 2}),
    exhibit("o_proj of narrow heads", "W_ODENSE",
            lambda folder: adapter(folder, _wide_o_proj(), target_modules=["o_proj"]),
            base={"hidden_size": 2 * HIDDEN, "head_dim": 4}),
    exhibit("the base's own embeddings", "W_REDUNDANT_EMBED", _saved(embeddings, f"{EMBED}.weight")),
    exhibit("the same, raw and wide", "W_REDUNDANT_EMBED", _saved(
        lambda: embeddings().astype("f4"), f"{EMBED}.modules_to_save.default.weight",
        f"{EMBED}.original_module.weight", f"{HEAD}.base_layer.weight")),
    _renamed("a raw state dict", "", ".weight", ".default.weight"),
    _renamed("a compiled model", "", "base_model.", "_orig_mod.base_model."),
    _renamed("FSDP and DDP", "", ROOT, f"module.{ROOT}_fsdp_wrapped_module."),
    _renamed("a model with images", "", ROOT, f"{ROOT}language_model."),
    _renamed("an older model with images", "", ROOT, "base_model.model.language_model.model."),
    _renamed("a bare model", "", ROOT, "base_model.model."),
    of_tensors("a tower of a model with images", "W_TOWER",
               lambda: plus(_TOWER, pair=(16, 4)), base=BASES["gemma3"]),
    exhibit("fused", "", lambda folder: adapter(folder, {
        f"{MLP}.gate_up_proj.lora_A.weight": np.ones((4, HIDDEN), "f2"),
        f"{MLP}.gate_up_proj.lora_B.weight": np.ones((2 * INTERMEDIATE, 4), "f2"),
    }, target_modules=["gate_up_proj"]), base={"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}),
)  # fmt: skip
