"""Configs of unsupported adapters, configs that lie, and configs that attack their reader."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from builder_service.domain.rules.adapter import MAX_CONFIG
from tests.golden.hostile.exhibit import BASE, CONFIG, adapter, exhibit, of_config, of_config_text
from tests.support.adapters import ADAPTER_CONFIG, tensors

_HEAD = f'"peft_type": "LORA", "base_model_name_or_path": "{BASE}", "target_modules": ["q_proj", "v_proj"]'
# 2 ** 30 ways to read a name of thirty characters, none of which ends as the pattern does.
EXPONENTIAL = r"(?:[a-z._0-9]|[a-z._0-9])*[^a-z._0-9]"
GIANT = "a{16000000}"
"""A pattern of twelve characters that takes some readers seconds and gigabytes."""


def _huge(folder: Path) -> None:
    adapter(folder)
    (folder / CONFIG).write_text(json.dumps(ADAPTER_CONFIG | {"filler": "x" * MAX_CONFIG}))


def _patterns(count: int) -> str:
    return ", ".join(f'"q{i}": 4' for i in range(count))


REFUSED = (
    of_config("rank zero", "E_BAD_CONFIG", r=0),
    of_config("rank true", "E_BAD_CONFIG", r=True),
    of_config("rank of 400 digits", "E_BAD_CONFIG", r=10**400),
    of_config("alpha as text", "E_BAD_CONFIG", lora_alpha="16"),
    of_config("alpha beyond its bound", "E_BAD_CONFIG", lora_alpha=1e30),
    of_config("rank as text", "E_BAD_CONFIG", r="4"),
    of_config("rank of a pattern zero", "E_BAD_CONFIG", rank_pattern={"q_proj": 0}),
    of_config("patterns as a list", "E_BAD_CONFIG", rank_pattern=["q_proj"]),
    of_config("pattern that is none", "E_BAD_CONFIG", alpha_pattern={"(": 8}),
    of_config("pattern of 5000 characters", "E_BAD_CONFIG", rank_pattern={"a" * 5000: 4}),
    of_config("exponential rank_pattern", "E_BAD_CONFIG", rank_pattern={EXPONENTIAL: 4}),
    of_config("exponential alpha_pattern", "E_BAD_CONFIG", alpha_pattern={EXPONENTIAL: 4}),
    of_config("exponential target_modules", "E_BAD_CONFIG", target_modules=EXPONENTIAL),
    of_config("exponential exclude_modules", "E_BAD_CONFIG", exclude_modules=EXPONENTIAL),
    of_config(
        "exponential layers_pattern", "E_BAD_CONFIG", layers_pattern=f"{EXPONENTIAL}x", layers_to_transform=1
    ),
    of_config("exclude_modules that is no pattern", "E_BAD_CONFIG", exclude_modules="("),
    of_config("layers as text", "E_BAD_CONFIG", layers_to_transform=["0"]),
    of_config("layers beside a pattern", "E_BAD_CONFIG", target_modules=".*_proj", layers_to_transform=[0]),
    of_config("layers_pattern alone", "E_BAD_CONFIG", layers_pattern="layers"),
    of_config("8,000 saved modules", "E_BAD_CONFIG", modules_to_save=[f"m{i}" for i in range(8000)]),
    of_config(
        "a base's class of a megabyte",
        "E_BASE",
        auto_mapping={"base_model_class": "x" + "ForA" * 250_000 + "!"},
    ),
    of_config("a base's name of a megabyte", "E_BAD_CONFIG", base_model_name_or_path="x" * 1_000_000),
    of_config("half a character", "E_BAD_CONFIG", revision="\ud800"),
    of_config("tensors without target", "E_TARGETS", target_modules=["q_proj"]),
    of_config("tensors and no target", "E_TARGETS", target_modules=[]),
    exhibit(
        "tensors that PEFT does not choose",
        "E_TARGETS",
        lambda folder: adapter(folder, tensors(("gate_proj",)), target_modules=None),
    ),
    of_config("pattern of other targets", "E_TARGETS", target_modules=r".*\.q_proj"),
    of_config("pattern that matches nothing", "E_TARGETS", target_modules="(?:q_prjo){e<=2}"),
    of_config("layers without the tensors'", "E_TARGETS", layers_to_transform=[0]),
    of_config("layers of another name", "E_TARGETS", layers_to_transform=[0, 1], layers_pattern="h"),
    of_config("excluded tensors", "E_TARGETS", exclude_modules=["v_proj"]),
    of_config("excluded by a pattern", "E_TARGETS", exclude_modules=r".*layers\.1\..*"),
    of_config("saved whole, and adapted", "E_TARGETS E_EMBED", modules_to_save=["self_attn"]),
    of_config("target_modules as a number", "E_BAD_CONFIG", target_modules=7),
    of_config("use_dora as text", "E_BAD_CONFIG", use_dora="false"),
    of_config("task_type as a list", "E_TASK", task_type=["CAUSAL_LM"]),
    of_config_text("NaN in JSON", "E_BAD_CONFIG", lambda: f'{{{_HEAD}, "r": 4, "lora_alpha": NaN}}'),
    of_config_text("number beyond float", "E_BAD_CONFIG", lambda: f'{{{_HEAD}, "r": 4, "lora_alpha": 1e999}}'),
    of_config_text("int of 10,000 digits", "E_BAD_CONFIG", lambda: f'{{{_HEAD}, "r": {"9" * 10_000}}}'),
    of_config_text("duplicate key", "E_BAD_CONFIG", lambda: f'{{{_HEAD}, "r": 4, "lora_alpha": 8, "r": 8}}'),
    of_config_text(
        "9,000 patterns", "E_BAD_CONFIG", lambda: f'{{{_HEAD}, "rank_pattern": {{{_patterns(9000)}}}}}'
    ),
    of_config_text("deep brackets", "E_BAD_CONFIG", lambda: "[" * 100_000),
    of_config_text("deep value", "E_BAD_CONFIG", lambda: f'{{{_HEAD}, "r": {"[" * 200}{"]" * 200}}}'),
    of_config_text("list", "E_BAD_CONFIG", lambda: "[]"),
    of_config_text("empty file", "E_BAD_CONFIG", lambda: ""),
    exhibit("config of 4 MiB", "E_BAD_CONFIG", _huge),
    of_config("BOFT", "E_NOT_LORA", peft_type="BOFT"),
    of_config("no peft_type", "E_NOT_LORA", peft_type=None),
    of_config("MLX config", "E_MLX", fine_tune_type="lora", lora_parameters={"rank": 8, "scale": 20.0}),
    of_config("DoRA config", "E_DORA", use_dora=True),
    of_config("a bias of another kind", "E_BIAS", bias="some"),
    of_config("lora_bias", "E_BIAS", lora_bias=True),
    of_config("QALoRA", "E_VARIANT", use_qalora=True, qalora_group_size=16),
    of_config("KaSA config", "E_VARIANT", kasa_config={"beta": 1}),
    of_config("Arrow", "E_VARIANT", arrow_config={"top_k": 3}),
    of_config("BD-LoRA", "E_VARIANT", use_bdlora={"nblocks": 2}),
    of_config("MonteCLoRA", "E_VARIANT", monteclora_config={"num_samples": 4}),
    of_config("PiSSA by chance", "E_INIT", init_lora_weights="pissa_niter_4"),
    of_config("PiSSA on a base without its weights", "E_INIT", init_lora_weights="pissa"),
    of_config("OLoRA with an alpha of zero", "E_INIT", init_lora_weights="olora", lora_alpha=0),
    of_config("CorDA", "E_INIT", init_lora_weights="corda"),
    of_config("LoRA-GA", "E_INIT", init_lora_weights="lora_ga"),
    of_config("LoftQ", "E_INIT", init_lora_weights="loftq"),
    of_config("invocation as text", "E_ALORA", alora_invocation_tokens="<|start|>"),
    of_config("invocation below zero", "E_ALORA", alora_invocation_tokens=[1, -2]),
    of_config("invocation of true and false", "E_ALORA", alora_invocation_tokens=[True, False]),
    of_config("invocation beyond the vocabulary", "E_ALORA", alora_invocation_tokens=[1, 32]),
    of_config("invocation of 65 tokens", "E_ALORA", alora_invocation_tokens=[1] * 65),
    of_config("invocation, and biases", "E_ALORA", alora_invocation_tokens=[1], bias="all"),
    of_config("layer_replication", "E_REPLICATION", layer_replication=[[0, 2], [1, 2]]),
    of_config("target_parameters", "E_TARGET_PARAMS", target_parameters=["mlp.experts.gate_up_proj"]),
    of_config(
        "target_parameters of attention", "E_TARGET_PARAMS", target_parameters=["self_attn.q_proj.weight"]
    ),
    of_config("norms saved whole", "E_EMBED", modules_to_save=["norm"]),
    *(of_config(kind, "E_TASK", task_type=kind) for kind in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")),
    of_config("SEQ_2_SEQ_LM", "E_TASK", task_type="SEQ_2_SEQ_LM"),
    of_config("modules_to_save without tensors", "E_EMBED", modules_to_save=["lm_head"]),
    of_config("trainable tokens without tensors", "E_EMBED", trainable_token_indices=[5]),
    of_config("another family", "E_BASE", auto_mapping={"base_model_class": "MistralForCausalLM"}),
    of_config("rank that is not the tensors'", "E_RANK_SHAPE", r=8),
    of_config("rank_pattern that is not the tensors'", "E_RANK_SHAPE", rank_pattern={"q_proj": 2}),
    of_config(
        "many fields at once",
        "E_DORA E_BIAS E_TASK E_RANK_SHAPE",
        use_dora=True,
        bias="every",
        task_type="SEQ_CLS",
        r=9,
    ),
)

ACCEPTED = (
    of_config("no rank", "W_RANK", r=None),
    of_config("biases that the base does not have", "", bias="all"),
    of_config("small alpha", "W_ALPHA", lora_alpha=2**-9),
    of_config("large alpha", "W_ALPHA W_MAGNITUDE", lora_alpha=1024),
    of_config("target without tensors", "W_TARGETS", target_modules=["q_proj", "v_proj", "gate_proj"]),
    of_config("giant rank_pattern", "", rank_pattern={GIANT: 8}),
    of_config("POSIX class that PEFT reads as letters", "", rank_pattern={"[[:alpha:]]_proj": 8}),
    of_config("alpha negative", "", lora_alpha=-8),
    of_config("invocation of 64 tokens", "", alora_invocation_tokens=[31] * 64),
    of_config("invocation of no tokens", "", alora_invocation_tokens=[]),
    exhibit("no target_modules", "W_TARGETS", lambda folder: adapter(folder, target_modules=None)),
    of_config("alphas of two patterns", "W_PATTERN_ORDER", alpha_pattern={"q_proj": 4, ".*attn.*": 8}),
    of_config("ranks of two patterns", "", rank_pattern={r".*\.q_proj": 2, "q_proj": 4}),
    of_config("unknown field", "W_UNKNOWN_FIELD", use_next_years_lora=True),
    of_config("another base's name", "W_BASE", base_model_name_or_path="org/another"),
    of_config("no base's name", "W_BASE", base_model_name_or_path=None),
    of_config("a copy of the base", "", base_model_name_or_path=f"unsloth/{BASE}-unsloth-bnb-4bit"),
    of_config("rsLoRA", "", use_rslora=True),
    of_config("no alpha", "", lora_alpha=None),
    of_config("no task", "", task_type=None),
    of_config("FEATURE_EXTRACTION", "", task_type="FEATURE_EXTRACTION"),
    *(
        of_config(f"init {kind}", "", init_lora_weights=kind)
        for kind in ("gaussian", "eva", "mica", "orthogonal", False)
    ),
    of_config("VeLoRA trains only", "", velora_config={"num_groups": 4}),
    of_config("Megatron", "", megatron_core="megatron.core", fan_in_fan_out=True, lora_dropout=0.1),
    of_config("layer subset", "", layers_to_transform=[0, 1], layers_pattern="layers", exclude_modules=["x"]),
    of_config("full names as targets", "", target_modules=[
        f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 1) for m in "qv"], layers_to_transform=[7]),
    of_config("all-linear", "", target_modules="all-linear"),
    of_config("pattern", "", target_modules=r"(?i)(?:.*?(?:self_attn|attention).*?(?:q_proj|V_PROJ)){1,}"),
    of_config("tied embeddings", "", ensure_weight_tying=True, revision="main"),
    exhibit(
        "full names in patterns",
        "W_NARROWED",
        lambda folder: adapter(
            folder,
            {name: value[:3] if "q_proj.lora_A" in name else value[:, :3] if "q_proj" in name else value
             for name, value in tensors().items()},
            rank_pattern={f"model.layers.{i}.self_attn.q_proj": 3 for i in (0, 1)},
            alpha_pattern={f"model.layers.{i}.self_attn.q_proj": 6.5 for i in (0, 1)},
            init_lora_weights="eva",
        ),
    ),
    exhibit(
        "float32",
        "W_NARROWED",
        lambda folder: adapter(folder, {name: value.astype("f4") * 1.01 for name, value in tensors().items()}),
    ),
    exhibit(
        "float16", "W_NARROWED",
        lambda folder: adapter(
            folder, {name: value.astype("f2") * np.float16(1.01) for name, value in tensors().items()}),
    ),
    exhibit(
        "bfloat16 in float32 and in float16", "",
        lambda folder: adapter(folder, {name: value.astype("f4" if "A" in name else "f2")
                                        for name, value in tensors().items()}),
    ),
    of_config("a scale that is not a power of two", "W_NARROWED", lora_alpha=12),
    exhibit("the same, exact", "", lambda folder: adapter(folder, lora_alpha=12), lora={"dtype": "float32"}),
    exhibit(
        "underflow",
        "W_UNDERFLOW",
        lambda folder: adapter(
            folder,
            {name: np.where(value > 0.5, 1, 2.0**-30).astype(ml_dtypes.bfloat16)
             for name, value in tensors().items()},
        ),
        lora={"dtype": "float16"},
    ),
)  # fmt: skip
