"""Adapters as trainers write them."""

from typing import Any, Final

import numpy as np

from tests.golden.wild.shape import ALL, NAME, Shape, beside, of_peft, only, renamed
from tests.support.adapters import HIDDEN, VOCAB, tensors

_ROOT: Final = "base_model.model.model."
_TEXT: Final = f"{_ROOT}language_model."
_IMAGES: Final = f"{_ROOT}vision_tower.encoder.layers.0.self_attn.q_proj"
_HEAD: Final = "base_model.model.lm_head"
_QUANTISED: Final = f"unsloth/{NAME}-unsloth-bnb-4bit"
_PARTS: Final = "self_attn|attention|attn|mlp|feed_forward|ffn|dense"
_LEAVES: Final = "k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj"
# Unsloth writes one pattern for all models, with or without towers.
_UNSLOTH: Final = (
    rf"(?:.*?(?:%s).*?(?:{_PARTS}).*?(?:{_LEAVES}).*?)"
    rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{_PARTS})\.(?:(?:{_LEAVES})))"
)
_FIXED: Final = {"parent_library": "transformers.models.llama.modeling_llama", "unsloth_fixed": True}
# What is not PEFT's own writes as few fields as PEFT needs.
_FEW: Final[dict[str, Any]] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
}


def _all() -> Any:
    return tensors(ALL)


def _in(prefix: str, of: Any = tensors) -> Any:
    return renamed((_ROOT, prefix), of=of)


def _experts() -> Any:
    for expert in range(3):
        for leaf, inside, out in (
            ("gate_proj", HIDDEN, 12),
            ("up_proj", HIDDEN, 12),
            ("down_proj", 12, HIDDEN),
        ):
            module = f"{_ROOT}layers.1.mlp.experts.{expert}.{leaf}"
            yield f"{module}.lora_A.weight", (4, inside)
            yield f"{module}.lora_B.weight", (out, 4)


def _empty() -> Any:
    return {key: np.zeros((0,), np.float32) for key in tensors()}


SHAPES: Final = (
    Shape("Unsloth", "2024", "the base in 4 bits, under Unsloth's name",
          of_peft("0.12", base_model_name_or_path=_QUANTISED, lora_dropout=0, target_modules=[*ALL]), _all),
    Shape("Unsloth", "2025", "a pattern for all parts, and `unsloth_fixed` in `auto_mapping`",
          of_peft(base_model_name_or_path=_QUANTISED, target_modules=_UNSLOTH % "language|text",
                  auto_mapping={"base_model_class": "LlamaForCausalLM", **_FIXED}), _all),
    Shape("Unsloth", "2025", "a model with images, its decoder alone",
          of_peft(target_modules=_UNSLOTH % "language|text"), _in(_TEXT, _all), base="gemma3"),
    Shape("Unsloth", "2025", "a model with images, the tower too",
          of_peft(target_modules=_UNSLOTH % "vision|image|visual|patch|language|text"),
          beside((f"{_IMAGES}.lora_A.weight", (4, 16)), (f"{_IMAGES}.lora_B.weight", (16, 4)), of=_in(_TEXT)),
          base="gemma3", codes="W_TOWER"),
    Shape("Unsloth", "2024", "embeddings and head in `modules_to_save`, raw",
          of_peft("0.12", base_model_name_or_path=_QUANTISED, modules_to_save=["lm_head"]),
          beside((f"{_HEAD}.modules_to_save.default.weight", (VOCAB, HIDDEN))),
          under={".modules_to_save.default": ""}),
    Shape("axolotl", "0.4 to 0.8", "a folder per checkpoint, none above", None, None,
          files=("checkpoint-500/adapter_config.json", "checkpoint-500/adapter_model.safetensors", "README.md"),
          codes="E_NO_CONFIG"),
    Shape("axolotl", "0.4 to 0.8", "checkpoints and states of the optimizer beside",
          files=("checkpoint-10/adapter_model.bin", "checkpoint-10/optimizer.pt", "config.json"),
          codes="W_EXTRA_FILES"),
    Shape("axolotl", "FSDP", "`_fsdp_wrapped_module` between all parts of the keys",
          tensors=renamed(("layers.0.", "layers.0._fsdp_wrapped_module."),
                          (_ROOT, f"_fsdp_wrapped_module.{_ROOT}")),
          under={"_fsdp_wrapped_module.": ""}),
    Shape("axolotl", "any", "checkpointed activations in the keys",
          tensors=renamed(("layers.1.", "layers.1._checkpoint_wrapped_module.")),
          under={"_checkpoint_wrapped_module.": ""}),
    Shape("LLaMA-Factory", "0.9", "the base under a folder, its tokenizer and a training log beside",
          of_peft("0.12", base_model_name_or_path=f"/data/models/{NAME}", target_modules=[*ALL]), _all,
          files=("all_results.json", "trainer_log.jsonl", "training_args.bin", "training_loss.png"),
          codes="W_EXTRA_FILES"),
    Shape("LLaMA-Factory", "0.9", "a model with images: a pattern without the tower",
          of_peft("0.15", target_modules=rf"^(?!.*(?:visual|vision_tower|projector)).*(?:{_LEAVES}).*"),
          _in(_TEXT), base="gemma3"),
    Shape("LLaMA-Factory", "0.8", "GLM-4: modules of another architecture",
          of_peft("0.12", target_modules=["query_key_value", "dense"]),
          only(("base_model.model.transformer.encoder.layers.0.self_attention.query_key_value.lora_A.weight",
                (4, HIDDEN))), codes="E_PREFIX"),
    Shape("ms-swift", "3", "a model with images: a pattern of the decoder's folder; its own file beside",
          of_peft("0.17", target_modules=rf"^(model.language_model(?=\.).*\.({_LEAVES}))$"), _in(_TEXT),
          base="gemma3", files=("additional_config.json", "args.json")),
    Shape("ms-swift", "2", "a folder per adapter", None, None,
          files=("default/adapter_config.json", "default/adapter_model.safetensors"), codes="E_NO_CONFIG"),
    Shape("TRL", "any", "SFT: plain, with the trainer's arguments beside", files=("training_args.bin",),
          codes="W_EXTRA_FILES"),
    Shape("TRL", "any", "DPO with a reference adapter: a folder per adapter", None, None,
          files=("train/adapter_config.json", "reference/adapter_config.json"), codes="E_NO_CONFIG"),
    Shape("TRL", "DeepSpeed ZeRO-3", "empty tensors, saved without gathering", tensors=_empty,
          codes="E_EMPTY_WEIGHTS"),
    Shape("torch.compile", "any", "`_orig_mod.` before the keys",
          tensors=_in(f"_orig_mod.{_ROOT}"), under={"_orig_mod.": ""}),
    Shape("DDP", "any", "`module.` before the keys", tensors=_in(f"module.{_ROOT}"),
          under={"module.base": "base"}),
    Shape("transformers", "before 4.52", "a model with images: `language_model.model.`",
          tensors=_in("base_model.model.language_model.model."), base="gemma3",
          under={"model.language_model.model.": "model.model.language_model."}),
    Shape("transformers", "before 4.52", "a model with images whose decoder had no folder",
          of_peft("0.12"), base="gemma3", under={"model.model.": "model.model.language_model."}),
    Shape("transformers", "from 4.52", "`model.language_model.model.` of a wrapped model",
          tensors=_in("base_model.model.model.language_model.model."), base="gemma3",
          under={"language_model.model.": "language_model."}),
    Shape("transformers", "any", "a bare decoder, without its head", tensors=_in("base_model.model."),
          under={"base_model.model.": _ROOT}),
    Shape("transformers", "any", "several files and an index", shards=3, under={}),
    Shape("transformers", "any", "several files, one of them missing", tensors=None, codes="E_SHARDED",
          files=("adapter_model-00002-of-00002.safetensors", "adapter_model.safetensors.index.json")),
    Shape("verl", "FSDP", "few fields, and keys of the wrapped model",
          _FEW | {"task_type": "CAUSAL_LM", "bias": "none"}, _in(f"_fsdp_wrapped_module.{_ROOT}"),
          codes="W_BASE", under={"_fsdp_wrapped_module.": ""}),
    Shape("verl", "merged by its own tool", "`lora_alpha` 0: it changes nothing",
          of_peft("0.15", lora_alpha=0), codes="W_ALPHA W_ZERO_B"),
    Shape("OpenRLHF", "any", "plain, all linears of the actor", of_peft("0.15", target_modules=[*ALL]), _all),
    Shape("torchtune", "0.5", "PEFT's names: only the fields that are needed",
          _FEW | {"base_model_name_or_path": NAME}),
    Shape("torchtune", "before 0.3", "the same without `peft_type`",
          {key: value for key, value in _FEW.items() if key != "peft_type"}, codes="E_NOT_LORA"),
    Shape("torchtune", "any", "its own container", None, None, files=("adapter_0.pt", "recipe_state.pt"),
          codes="E_CONTAINER"),
    Shape("Tinker", "exported to PEFT", "few fields, `all-linear`",
          _FEW | {"base_model_name_or_path": NAME, "target_modules": "all-linear", "bias": "none"}, _all),
    Shape("Tinker", "raw", "the head as `unembed_tokens`",
          _FEW | {"base_model_name_or_path": NAME, "target_modules": "all-linear"},
          beside((f"{_ROOT}unembed_tokens.lora_A.weight", (4, HIDDEN)),
                 (f"{_ROOT}unembed_tokens.lora_B.weight", (VOCAB, 4))), codes="E_EMBED"),
    Shape("Tinker", "raw", "experts in three dimensions, as w1, w2 and w3", base="qwen3_moe",
          config=_FEW | {"base_model_name_or_path": NAME, "target_modules": "all-linear"},
          tensors=only((f"{_ROOT}layers.0.mlp.experts.w1.lora_A.weight", (1, 4, HIDDEN)),
                       (f"{_ROOT}layers.0.mlp.experts.w1.lora_B.weight", (3, 12, 4))), codes="E_MOE"),
    Shape("Tinker", "exported to PEFT", "an expert at a time", base="qwen3_moe",
          config=_FEW | {"base_model_name_or_path": NAME,
                         "target_modules": ["gate_proj", "up_proj", "down_proj"]},
          tensors=only(*_experts())),
    Shape("NeMo AutoModel", "0.2", "Hugging Face's form: full names as targets",
          _FEW | {"task_type": "CAUSAL_LM", "base_model_name_or_path": NAME, "bias": "none",
                  "target_modules": [f"model.layers.{layer}.self_attn.{name}_proj"
                                     for layer in (0, 1) for name in "qv"]},
          files=("automodel_peft_config.json",)),
    Shape("NeMo", "1 and 2", "its own container", None, None, files=("adapter.nemo",), codes="E_CONTAINER"),
    Shape("Megatron", "any", "keys of Megatron's modules", codes="E_CONTAINER",
          tensors=only(("model.decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight",
                        (4, HIDDEN)))),
    Shape("MLX", "any", "its own files",
          {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4}}, None,
          files=("adapters.safetensors",), codes="E_MLX"),
    Shape("MLX", "copied under PEFT's names", "keys `lora_a`, `lora_b`, transposed", codes="E_MLX",
          tensors=only(("model.layers.0.self_attn.q_proj.lora_a", (HIDDEN, 4)),
                       ("model.layers.0.self_attn.q_proj.lora_b", (4, HIDDEN)))),
    Shape("mistral-finetune", "any", "its own files", None, None, files=("lora.safetensors", "params.json"),
          codes="E_CONTAINER"),
    Shape("diffusers", "any", "an adapter of images", None, None, files=("pytorch_lora_weights.safetensors",),
          codes="E_CONTAINER"),
    Shape("kohya, LyCORIS", "any", "keys of another family under PEFT's file names", codes="E_CONTAINER",
          tensors=only(("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", (4, HIDDEN)))),
    Shape("llama.cpp", "any", "GGUF", None, None, files=("adapter-f16.gguf",), codes="E_CONTAINER"),
    Shape("X-LoRA", "any", "a mixture of adapters", of_peft("0.11", peft_type="XLORA"), codes="E_NOT_LORA"),
)  # fmt: skip
