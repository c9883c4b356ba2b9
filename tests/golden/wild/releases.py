"""Adapters as the releases of PEFT itself write them."""

from collections.abc import Callable
from itertools import pairwise
from typing import Final

from tests.golden.wild.shape import ALL, ATTENTION, NAME, RELEASES, Shape, beside, of_peft, only, renamed
from tests.support.adapters import HIDDEN, VOCAB, Tensors, tensors

_SPANS: Final = {**{a: a if int(b[2:]) - int(a[2:]) == 1 else f"{a} to 0.{int(b[2:]) - 1}"
                    for a, b in pairwise(RELEASES)}, "0.21": "0.21"}  # fmt: skip
_ROOT: Final = "base_model.model.model."
_Q: Final = f"{_ROOT}layers.0.self_attn.q_proj"
_NAMES: Final = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"]
_EXPERTS: Final = f"{_ROOT}layers.0.mlp.experts"


def _peft(release: str, what: str, **fields: object) -> Shape:
    return Shape("PEFT", release, what, **fields)  # type: ignore[arg-type]


def _each(name: str) -> Callable[[], Tensors]:
    """Return tensors with one of this name beside every A and B."""
    sizes = {"q_proj": HIDDEN, "v_proj": HIDDEN // 2}
    places = [(f"{_ROOT}{module.removeprefix('model.')}", module.rpartition(".")[2]) for module in _NAMES]
    return beside(*((f"{place}.{name}", (sizes[leaf],)) for place, leaf in places))


SHAPES: Final = (
    *(_peft(_SPANS[name], f"fields of {name}", config=of_peft(name)) for name in RELEASES),
    _peft("0.2 to 0.6", "`adapter_model.bin` alone, the default then", tensors=None,
          files=("adapter_model.bin",), codes="E_BIN_ONLY"),
    _peft("any", "raw state dict: `.default.` in the keys", tensors=renamed((".weight", ".default.weight")),
          under={".default.weight": ".weight"}),
    _peft("any", "raw state dict: another adapter's name in the keys",
          tensors=renamed((".weight", ".sft-v2.weight")), under={".sft-v2.weight": ".weight"}),
    _peft("any", "an adapter that is not called `default`: in a folder of its name", config=None, tensors=None,
          files=("sft/adapter_config.json", "sft/adapter_model.safetensors"), codes="E_NO_CONFIG"),
    _peft("any", "adapters of several tasks in one file", codes="E_ADAPTER_INFIX",
          tensors=lambda: {key.replace(".weight", f".{task}.weight"): value for task in ("code", "retrieval")
                           for key, value in tensors().items()}),
    _peft("0.8", "`target_modules` `all-linear`", config=of_peft("0.8", target_modules="all-linear"),
          tensors=lambda: tensors(ALL)),
    _peft("any", "`target_modules` a pattern",
          config=of_peft("0.12", target_modules=r".*\.self_attn\.(q|k|v|o)_proj"),
          tensors=lambda: tensors(ATTENTION)),
    _peft("any", "layers by `layers_to_transform` and `layers_pattern`",
          config=of_peft("0.12", layers_to_transform=[0], layers_pattern="layers"),
          tensors=lambda: tensors(layers=1)),
    _peft("0.6", "`rank_pattern` and `alpha_pattern`",
          config=of_peft("0.6", r=8, rank_pattern={"q_proj": 4, r".*\.v_proj": 4},
                         alpha_pattern={"v_proj": 3})),
    _peft("0.8", "rsLoRA", config=of_peft("0.8", use_rslora=True, lora_alpha=12)),
    _peft("0.14", "EVA: full names in both patterns, alphas that are fractions",
          config=of_peft("0.14", init_lora_weights="eva", r=8, rank_pattern=dict.fromkeys(_NAMES, 4),
                         alpha_pattern=dict.fromkeys(_NAMES, 5.656854249492381))),
    _peft("0.8", "gaussian, orthogonal or MiCA initialisation",
          config=of_peft("0.21", init_lora_weights="gaussian")),
    _peft("0.11", "PiSSA that was not converted", config=of_peft("0.11", init_lora_weights="pissa_niter_16"),
          codes="E_INIT"),
    _peft("0.11", "PiSSA, converted when it was saved: twice the rank",
          config=of_peft("0.12", r=8, lora_alpha=16), tensors=lambda: tensors(rank=8)),
    _peft("0.15", "CorDA or LoRA-GA that was not converted", config=of_peft("0.15", init_lora_weights="corda"),
          codes="E_INIT"),
    _peft("0.7", "LoftQ", config=of_peft("0.7", init_lora_weights="loftq", loftq_config={"loftq_bits": 4}),
          codes="E_INIT"),
    _peft("0.14", "DoRA: `lora_magnitude_vector`", config=of_peft("0.14", use_dora=True),
          tensors=_each("lora_magnitude_vector")),
    _peft("0.9", "DoRA, raw: `lora_magnitude_vector.default.weight`", config=of_peft("0.9", use_dora=True),
          tensors=renamed((".weight", ".default.weight"), of=_each("lora_magnitude_vector.weight")),
          under={".default.weight": ".weight", "vector.weight": "vector"}),
    _peft("0.14", "DoRA, without some magnitudes", config=of_peft("0.14", use_dora=True),
          tensors=beside((f"{_Q}.lora_magnitude_vector", (HIDDEN,))), codes="E_DORA"),
    _peft("0.14", "`lora_bias`", config=of_peft("0.14", lora_bias=True), tensors=_each("lora_B.bias")),
    _peft("any", "`bias: lora_only`, of a base without", config=of_peft("0.12", bias="lora_only")),
    _peft("0.10", "`layer_replication`", config=of_peft("0.10", layer_replication=[[0, 2], [1, 2]]),
          codes="E_REPLICATION"),
    _peft("0.17", "`target_parameters` of experts", base="qwen3_moe",
          config=of_peft("0.17", target_modules=[], lora_dropout=0.0,
                         target_parameters=["mlp.experts.down_proj"]),
          tensors=only((f"{_EXPERTS}.lora_A.weight", (12, 12)), (f"{_EXPERTS}.lora_B.weight", (HIDDEN, 12)))),
    _peft("0.18", "activated LoRA", config=of_peft("0.18", alora_invocation_tokens=[3, 4])),
    _peft("0.15", "`trainable_token_indices`",
          config=of_peft("0.15", trainable_token_indices={"embed_tokens": [3]}),
          tensors=beside((f"{_ROOT}embed_tokens.token_adapter.trainable_tokens_delta", (1, HIDDEN)))),
    _peft("any", "`modules_to_save` of embeddings and head",
          config=of_peft("0.12", modules_to_save=["embed_tokens", "lm_head"]),
          tensors=beside((f"{_ROOT}embed_tokens.weight", (VOCAB, HIDDEN)),
                         ("base_model.model.lm_head.weight", (VOCAB, HIDDEN)))),
    _peft("0.9", "a vocabulary that was resized: whole embeddings beside", config=of_peft("0.12"),
          tensors=beside((f"{_ROOT}embed_tokens.weight", (VOCAB + 2, HIDDEN))), codes="E_EMBED"),
    _peft("0.12", "a vocabulary that was resized: embeddings and head beside", config=of_peft("0.12"),
          tensors=beside((f"{_ROOT}embed_tokens.weight", (VOCAB + 2, HIDDEN)),
                         ("base_model.model.lm_head.weight", (VOCAB + 2, HIDDEN)))),
    _peft("any", "`SEQ_CLS`: a classifier with its score head",
          config=of_peft("0.12", task_type="SEQ_CLS", modules_to_save=["classifier", "score"]),
          tensors=beside(("base_model.model.score.weight", (2, HIDDEN)))),
    _peft("any", "`SEQ_CLS` without its score head",
          config=of_peft("0.12", task_type="SEQ_CLS", modules_to_save=["classifier", "score"]), codes="E_TASK"),
    _peft("any", "`TOKEN_CLS`: trained to label tokens",
          config=of_peft("0.12", task_type="TOKEN_CLS", modules_to_save=["classifier", "score"]),
          tensors=beside(("base_model.model.score.weight", (2, HIDDEN)),
                         ("base_model.model.score.bias", (2,))), codes="E_EMBED E_EMBED E_EMBED E_TASK"),
    _peft("later", "a field that this version does not know, unset", config=of_peft(next_years_config=None)),
    _peft("later", "a field that this version does not know, set", config=of_peft(next_years_lora=True),
          codes="W_UNKNOWN_FIELD"),
    _peft("any", "`base_model_name_or_path` null", config=of_peft("0.12", base_model_name_or_path=None),
          codes="W_BASE"),
    _peft("any", "`r` left out: PEFT's default is 8",
          config={key: value for key, value in of_peft("0.12").items() if key != "r"},
          tensors=lambda: tensors(rank=8), codes="W_RANK"),
    _peft("any", "`r` a fraction, as a script that computed it wrote", config=of_peft("0.12", r=4.0),
          codes="E_BAD_CONFIG"),
    _peft("any", "a copy under a folder of another machine",
          config=of_peft("0.12", base_model_name_or_path=f"/root/autodl-tmp/models/{NAME}")),
    _peft("any", "fused projections of Phi-3", base="phi3",
          config=of_peft("0.12", target_modules=["qkv_proj", "gate_up_proj"]),
          tensors=only((f"{_ROOT}layers.1.self_attn.qkv_proj.lora_A.weight", (4, HIDDEN)),
                       (f"{_ROOT}layers.1.self_attn.qkv_proj.lora_B.weight", (2 * HIDDEN, 4)),
                       (f"{_ROOT}layers.1.mlp.gate_up_proj.lora_A.weight", (4, HIDDEN)),
                       (f"{_ROOT}layers.1.mlp.gate_up_proj.lora_B.weight", (48, 4)))),
)  # fmt: skip
