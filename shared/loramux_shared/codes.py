"""Every code of a finding, and the cure of every reason of a fault: docs/reference/errors.md is made of it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Subject(StrEnum):
    """The subject of a finding."""

    DEPLOYMENT = "a deployment or a request"
    REFUSED = "an adapter that is refused"
    WARNED = "an adapter that is accepted"
    BASE = "a base that is served"


@dataclass(frozen=True)
class CodeEntry:
    """A code."""

    code: str
    subject: Subject
    meaning: str
    cure: str


_MERGE: Final = "Merge it into the base (`merge_and_unload`) and serve a full model."
_TRAIN: Final = "Train again without it, or merge it into the base and serve a full model."

_DEPLOYMENT: Final = (
    ("E_UNKNOWN_FIELD", "an unknown key", "Use the nearest known key, which the finding names, or remove it."),
    ("E_MISSING_FIELD", "a required key is missing", "Set it."),
    ("E_BAD_FIELD", "an invalid value", "Use a value that the finding allows."),
    ("E_UNSUPPORTED", "a feature of OpenAI's API that this server lacks", "Leave it out."),
    ("E_CONSTRAINT", "an unusable response format", "Correct or simplify it."),
    (
        "E_MESSAGES",
        "the chat template refuses the messages",
        "Correct them; often one role comes twice in a row.",
    ),
    (
        "W_REPLACED",
        "an adapter of the deployment's file replaces an added or pushed one of the same name",
        "Add or push that one under another name; `loramux rollback` restores it.",
    ),
    (
        "W_UNSERVED",
        "a key of hosted engine builders that asks for an unsupported feature",
        "Set what the finding names instead, or remove the key.",
    ),
    (
        "E_NO_FIX",
        "`loramux check --fix`: the adapter does what A and B of a plain LoRA cannot do",
        "Use what the finding names: another training, or merge it into the base.",
    ),
    ("E_NO_TEMPLATE", "messages for a model without a chat template", "Send text or token_ids."),
)
_REFUSED: Final = (
    ("E_NO_CONFIG", "`adapter_config.json` is missing",
     "Correct the repository, or set the subfolder that the finding names."),
    ("E_SIGNATURE", "the deployment requires signatures, and the files have none of a required signer, or were "
     "changed since", "Sign the folder (`loramux sign`), or correct `signed_by`."),
    ("E_NO_WEIGHTS", "the weights are missing beside the config", "Save or upload the adapter again."),
    ("E_BIN_ONLY", "the weights are pickled, which can run code", "Save with `safe_serialization=True`."),
    ("E_SHARDED", "some of the files of sharded weights, or their index, are missing",
     "Upload all of them, or save the adapter as one file, as PEFT does."),
    ("E_CONTAINER", "files or keys of another program: mistral-finetune, torchtune, NeMo, Orbax, diffusers; a "
     "model of llama.cpp, or several of its files", "Convert the adapter to PEFT's format, or name its file."),
    ("E_BAD_WEIGHTS", "`adapter_model.safetensors`, or the adapter's file of GGUF, is truncated, has an "
     "inconsistent header, or is none",
     "Download or save it again."),
    ("E_TENSORS", "more tensors than the modules of any base of its kind have, as adapters of experts may",
     _MERGE),
    ("E_BAD_NPY", "TensorRT-LLM's npy files are damaged or do not belong together",
     "Convert the adapter again."),
    ("E_BAD_TEXT", "a chat template, tokenizer or generation config that cannot be read", "Correct the file."),
    ("E_EMPTY_WEIGHTS", "no tensors, or tensors without elements, as ZeRO-3 saves without gathering",
     "Save with `stage3_gather_16bit_weights_on_model_save`, or from the consolidated state dict."),
    ("E_EMPTY_TARGETS", "no target modules and no tensors", "Train again with `target_modules`."),
    ("E_BAD_CONFIG", "the config is not a JSON object, has a key twice, or a field has an impossible value or "
     "a pattern that cannot be matched in time", "Correct the file."),
    ("E_NOT_LORA", "`peft_type` is neither LORA nor a kind that amounts to it (ADALORA, IA3, LOHA, LOKR, MISS, "
     "TRAINABLE_TOKENS, VERA), a VeRA adapter without its projections, or MiSS with `init_weights` `bat`",
     f"{_MERGE} PEFT's `save_as_lora` approximates some kinds by a LoRA. Save VeRA again with "
     "`save_projection`."),
    ("E_MLX", "an MLX adapter: transposed, with an absolute scale",
     "Transpose both matrices, rename them, and set `lora_alpha = scale * rank`."),
    ("E_DORA", "magnitudes of DoRA without `use_dora`, or the reverse; magnitudes of experts, of parameters, "
     "or in the names of the authors' code; or a quantized base, where the builder has no torch to widen it",
     "Correct `use_dora`, install `loramux[inference]` beside the builder, or merge it."),
    ("E_BIAS", "biases of modules that have none in the base or are no linear of its layers, or that PEFT "
     "would not load", "Train with `bias` `none` or `lora_only`, or merge it."),
    ("E_VARIANT", "a variant whose factors are not plain A and B (Arrow, BD-LoRA, KaSA, MonteCLoRA, QALoRA), "
     "or a feature that PEFT has for LoRA alone, beside another kind",
     _MERGE),
    ("E_ALORA", "`alora_invocation_tokens` is not a list of at most 64 tokens of the base, or stands beside a "
     "feature without an activated form in PEFT, or one that acts before them: DoRA, `bias`, PiSSA, "
     "parameters, embeddings, a head", "Correct the list, or train without that feature."),
    ("E_REPLICATION", "`layer_replication`: layers that the base does not have", _MERGE),
    ("E_TARGET_PARAMS", "`target_parameters` other than `gate_up_proj` and `down_proj` of experts, without "
     "their tensors, or for a base without experts", _MERGE),
    ("E_MOE", "tensors of routers, or of experts that the base does not have", _MERGE),
    ("E_INIT", "the initialisation changed the base, by data or by chance (CorDA, LoRA-GA, LoftQ, "
     "`pissa_niter_4`), or in a way that this base does not determine (PiSSA, OLoRA)",
     "Save again with `path_initial_model_for_weight_conversion`; a LoftQ adapter needs its own base."),
    ("E_TASK", "trained for another task, or to classify without a score head that fits the base",
     "Use an adapter with `task_type` CAUSAL_LM or FEATURE_EXTRACTION, or SEQ_CLS with its `score.weight`; "
     "TOKEN_CLS is for encoders."),
    ("E_EMBED", "embeddings and a head of different lengths, tokens without rows or with another id, rows "
     "that do not fit `trainable_token_indices`, and `modules_to_save` of anything else that differs from the "
     "base's",
     _TRAIN),
    ("E_BASE", "the config names a base of another family", "Use the base that it was trained on."),
    ("E_UNKNOWN_KEY", "tensors with unknown keys; none are dropped silently",
     "Rename them to the form that the finding names."),
    ("E_ADAPTER_INFIX", "keys of several adapters", "`save_pretrained(selected_adapters=[...])`."),
    ("E_PREFIX", "layers of an encoder, or of a tower that the base does not have",
     "Train with `exclude_modules` for them."),
    ("E_MODULE", "a module that is not served, that the base lacks, or that `lora_target_modules` does "
     "not allow", "Train without it, or extend `lora_target_modules`."),
    ("E_TARGETS", "tensors of modules that the config leaves out by `target_modules`, `layers_to_transform`, "
     "`exclude_modules` or `modules_to_save`: PEFT drops them silently",
     "Correct the named field, or save the adapter without these tensors."),
    ("E_PAIR", "A without B, B without A, or a module twice", "Save the adapter again."),
    ("E_RANK_SHAPE", "A, B and the config disagree about the rank", "Correct `r` or `rank_pattern`."),
    ("E_DIMS", "the shapes are those of another base", "Use the base that it was trained on."),
    ("E_LAYER", "a layer that the base does not have", "Use the base that it was trained on."),
    ("E_RANK_MAX", "a rank above `max_lora_rank`", "Set `max_lora_rank` to the number in the finding."),
    ("E_NAN", "NaN or infinite values", "Use an earlier checkpoint: training diverged."),
    ("E_OVERFLOW", "a value, scale included, beyond the storage type", "Build with bfloat16 or float32."),
    ("E_MAGNITUDE", "a product of scale, B and A beyond every type of computations: answers would be NaN",
     "Use an earlier checkpoint: training diverged."),
    ("E_DTYPE", "tensors that are not F32, F16 or BF16", "Save the adapter in one of them."),
)  # fmt: skip
_WARNED: Final = (
    ("W_NARROWED", "values are rounded in the storage type: float32 or float16 in a narrower one, or a scale "
     "that is no power of two; the finding has the largest relative error",
     "Nothing, or set `lora_configuration.dtype` to float32."),
    ("W_ZERO_B", "the adapter changes nothing: B, or BA, is zero in every row, "
     "scales are 1, and matrices beside are the base's own",
     "Check the training; an untrained adapter looks like this."),
    ("W_UNDERFLOW", "more than 1 % of the values become zero in the storage type", "Build with bfloat16."),
    ("W_ALPHA", "alpha/r below 0.001 or above 64", "Check `lora_alpha`."),
    ("W_MAGNITUDE", "the norm of the product of scale, B and A is more than 100 times that of the base's "
     "weight, and of a weight that keeps the size of its input: its answers may become NaN (`NUMERICS`)",
     "Check the training and `lora_alpha`; compare its answers with those of an earlier checkpoint."),
    ("W_RANK", "the config has no rank; that of the tensors is used", "Nothing."),
    ("W_TARGETS", "`target_modules` names modules without tensors, or is missing: PEFT's default counts",
     "Check that it is the right file."),
    ("W_PATTERN_ORDER", "several patterns of `alpha_pattern` match a module and differ; the "
     "first in the file counts, as in PEFT, which sorts them when it saves",
     "Check that it is the alpha of the training, or write patterns that exclude each other."),
    ("W_UNKNOWN_FIELD", "fields of the config that are unknown to this version",
     "Check that they do not change the adapter's outputs."),
    ("W_ODENSE", "o_proj where heads x head_dim differs from hidden: TensorRT-LLM could not read these rows",
     "Nothing; loramux serves them."),
    ("W_BASE", "the adapter names another base than the deployment, not only another format of it; its shapes "
     "fit", "Check that it was trained on this base."),
    ("W_LICENSE", "adapter and base name different licences in the front matter of their `README.md`, or only "
     "one of them names one", "Check that both licences allow your use."),
    ("W_REDUNDANT_EMBED", "whole matrices or biases that are equal to the base's own, value by value, are left "
     "out", "Nothing."),
    ("W_TOWER", "tensors of a tower for images or sound are left out: bases here answer texts alone",
     "Nothing."),
    ("W_EXTRA_FILES", "checkpoints, optimizer states and other weights beside the adapter are not used",
     "Check that it is the right folder."),
    ("W_GATE_UP", "imported rows of a fused gate and up projection, whose halves converters order differently",
     "Check the order that the import names."),
    ("W_TRUNCATED", "rows above `truncate_to_rank` are approximated, as the deployment asks; the finding has "
     "the relative error", "Remove `truncate_to_rank`, or raise it, if the error is too large."),
    ("W_GENERATION", "fields of `generation_config.json` or `tokenizer_config.json` that are not used",
     "Send them with each request, if it has such fields."),
)  # fmt: skip

_BASE: Final = (
    ("W_HEAD", "the config ties the head to the embeddings, and the checkpoint has another `lm_head.weight`, "
     "which is served", "Set `tie_word_embeddings` to false, or remove the tensor if it is a leftover."),
    ("W_WIDENED", "the base's weights are stored in 8 or 4 bits; a replica widens them at load, exactly, to "
     "the type in which it serves", "Nothing, if replicas have that memory."),
)  # fmt: skip

CODES: Final = {
    code: CodeEntry(code, subject, meaning, cure)
    for subject, entries in (
        (Subject.DEPLOYMENT, _DEPLOYMENT),
        (Subject.REFUSED, _REFUSED),
        (Subject.WARNED, _WARNED),
        (Subject.BASE, _BASE),
    )
    for code, meaning, cure in entries
}
"""Entries by code."""

CURES: Final = {
    "ADAPTER_INVALID": "follow the cure of each finding",
    "DEPLOYMENT_INVALID": "correct the fields that the findings name",
    "REQUEST_INVALID": "correct the fields that the findings name",
    "PROMPT_TOO_LONG": "shorten the prompt or ask for fewer tokens; the message has both numbers",
    "PAGE_TOKEN_INVALID": "use `next_page_token` of the last answer",
    "UNAUTHENTICATED": "send a key: docs/guides/access.md",
    "PERMISSION_DENIED": "use a key with the named scope",
    "HOST_REFUSED": "use `localhost`, set `LORAMUX_HTTP_HOSTS`, or require keys",
    "REPO_NOT_FOUND": "correct the name, or name a secret",
    "REVISION_NOT_FOUND": "correct or drop the revision; that of LOCAL is the content's digest",
    "REPO_GATED": "accept the licence, or use another token",
    "SOURCE_REFUSED": "use a source that the message allows, or ask the operator",
    "SOURCE_CHANGED": "retry when no process writes to it",
    "SOURCE_UNAVAILABLE": "retry",
    "STORE_UNAVAILABLE": "retry; then check the store",
    "SERVER_UNAVAILABLE": "start it, or retry",
    "SHUTTING_DOWN": "retry with its successor",
    "REPLICA_FAILED": "retry with another replica; the server's log has the details",
    "REPLICA_BEHIND": "retry; if it stays behind, see docs/guides/updates.md",
    "REPLICA_PAUSED": "retry, here or with another replica",
    "DEPLOYMENT_NOT_FOUND": "use a name that the message lists",
    "GENERATION_NOT_FOUND": "use a number that the message names",
    "ADAPTER_NOT_FOUND": "use a name that the message lists",
    "MODEL_NOT_FOUND": "use a name that the message lists",
    "FILE_NOT_FOUND": "use an id of `GET /v1/files`; files expire",
    "BATCH_NOT_FOUND": "use an id of `GET /v1/batches`",
    "REQUEST_ID_REUSED": "draw a new one",
    "ADAPTER_EXISTS": "set replace, or unload the adapter first",
    "GENERATION_MISMATCH": "check the changes, then repeat with the number of the newest generation",
    "BUILD_IN_PROGRESS": "watch it, then call again",
    "BUILD_INTERRUPTED": "wait: the build continues when the builder restarts",
    "BUILD_CANCELLED": "build again, if that was a mistake",
    "BUILD_TIMED_OUT": "find the slow adapter; raise LORAMUX_BUILD_TIMEOUT_S if it is just large",
    "DEADLINE_EXCEEDED": "give it more time, or ask for fewer tokens",
    "CLIENT_STALLED": "send and read without pauses; call again",
    "QUEUE_FULL": "retry",
    "RATE_LIMITED": "retry after the delay; the limits are those of the deployment file or of the key",
    "BUNDLE_NOT_FOUND": "build the adapter, or name a digest of `loramux history --json`",
    "BATCH_CORRUPT": "check the write access to the store, and send the file or the batch again",
    "BUNDLE_CORRUPT": "restore the file, or build the deployment again",
    "RECORD_TOO_LARGE": "check the write access to the store, remove the object, and build the deployment "
    "again",
    "SIGNATURE_INVALID": "sign it, or build it again with a builder that signs; check the required signers",
    "PROOF_FAILED": "build the deployment again; then check the named rows",
    "NUMERICS": "replace the adapter: its weights overflow; serve a base in a type that holds its values",
    "MODEL_UNUSABLE": "push or load another version of the adapter",
    "CHECKPOINT_INVALID": "choose another base; the message has the reason",
    "RESOURCES_EXHAUSTED": "free or add memory or disk; the message has the numbers",
    "NO_BUILDER": "start the replica with `--builder HOST:PORT`, or load `bundle:DIGEST`",
    "SETTINGS_INVALID": "use a value that the message allows",
    "INTERNAL": "report it; the server's log has the details under the request's id",
}
"""Cures by the reason of a fault."""
