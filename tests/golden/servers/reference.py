"""The right answers: transformers and PEFT in float32, of an adapter as it is and of parts of it."""

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import numpy as np
import peft
import torch
import transformers
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tests.golden.servers.probes import WIDE_BASES, wide
from tests.golden.wild.shape import CONFIG, WEIGHTS, Shape, made
from tests.support.adapters import VOCAB, Tensors

PROMPT: Final = (7, 19, 3, 4, 11, 28, 6, 15, 3, 22, 9, 30, 5, 17)
"""Has the tokens that shapes name: 3, and 3 with 4 behind it."""
TOLERANCE: Final = 2e-3
"""Largest difference of a log probability between two programs that compute the same in float32."""
FAILURES: Final = (
    ValueError, RuntimeError, KeyError, TypeError, AttributeError, AssertionError, IndexError, ImportError,
    OSError, SafetensorError, UnpicklingError,
)  # fmt: skip
"""Exceptions by which PEFT refuses an adapter."""
LogProbs = np.ndarray[Any, Any]
"""Log probabilities of each token of the vocabulary, at each place of the prompt."""


@cache
def base_of(name: str) -> Any:
    """Return a random model."""
    fields = WIDE_BASES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**fields)
    config.dtype = torch.float32
    model = getattr(transformers, fields["architectures"][0])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def log_probs(model: Any) -> LogProbs:
    """Return what a model says about the prompt."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0, -len(PROMPT) :, :VOCAB]
    found: LogProbs = torch.log_softmax(logits.float(), -1).numpy()
    return found


def adapted(base: str, folder: Path, rows: int = VOCAB) -> Any:
    """Return a base with an adapter that PEFT loads."""
    model = copy.deepcopy(base_of(base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if rows != VOCAB:
            model.resize_token_embeddings(rows)
        torch.manual_seed(0)
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def rows_of(values: Tensors) -> int:
    """Return the tokens that the embeddings beside an adapter have rows for."""
    return next((len(each) for name, each in values.items() if name.endswith("embed_tokens.weight")), VOCAB)


def right(shape: Shape, folder: Path) -> LogProbs | None:
    """Return what an adapter means: PEFT's answer to its tensors under PEFT's names; None where it has none.

    A config without `peft_type` is one of LoRA here, and a whole number with a point is a number.
    """
    if shape.config is None or shape.tensors is None:
        return None
    values = shape.tensors()
    config = {"peft_type": "LORA"} | dict(shape.config)
    config |= {"r": int(config["r"])} if isinstance(config.get("r"), float) else {}
    try:
        return log_probs(
            adapted(shape.base, replace(shape, config=config).write_for_peft(folder), rows_of(values))
        )
    except FAILURES:
        return None


@dataclass(frozen=True)
class Reading:
    """A way to misread an adapter."""

    how: str
    config: Mapping[str, Any]
    tensors: Tensors


_PLAIN: Final[dict[str, dict[str, Any]]] = {
    "rsLoRA is ignored": {"use_rslora": False},
    "rank_pattern and alpha_pattern are ignored": {"alpha_pattern": {}, "rank_pattern": {}},
    "alpha_pattern is ignored": {"alpha_pattern": {}},
    "DoRA is ignored": {"use_dora": False},
    "lora_bias is ignored": {"lora_bias": False},
    "modules_to_save is ignored": {"modules_to_save": None},
    "trainable_token_indices is ignored": {"trainable_token_indices": None},
    "it acts on every token": {"alora_invocation_tokens": None},
    "the initialisation is ignored": {"init_lora_weights": True},
    "layer_replication is ignored": {"layer_replication": None},
}
_EXTRAS: Final = (
    "magnitude",
    "lora_B.bias",
    "embed_tokens",
    "lm_head",
    "trainable_tokens",
    "score",
    "base_layer",
)


def readings(shape: Shape) -> Iterator[Reading]:
    """Yield ways to misread an adapter: without a feature, without a module, without a layer."""
    config = dict(shape.config or {})
    values = _renamed(shape)
    plain = {name: value for name, value in values.items() if not any(each in name for each in _EXTRAS)}
    for how, change in _PLAIN.items():
        if any(config.get(name) not in (None, False, {}, [], value) for name, value in change.items()):
            yield Reading(how, config | change, plain)
            yield Reading(how, config | change, values)
    everything = {
        name: value for change in _PLAIN.values() for name, value in change.items() if name != "use_rslora"
    }
    yield Reading("all but A and B is ignored", config | everything, plain)
    for how, kept in _parts(values):
        yield Reading(how, config, kept)
        yield Reading(how, config | everything, {name: kept[name] for name in kept if name in plain})


def _parts(values: Tensors) -> Iterator[tuple[str, Tensors]]:
    leaves = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in values if ".lora_" in name})
    for leaf in leaves:
        yield f"{leaf} is ignored", {name: value for name, value in values.items() if f".{leaf}." not in name}
        yield (
            f"all but {leaf} is ignored",
            {name: value for name, value in values.items() if f".{leaf}." in name},
        )
    for layer in (0, 1, 2):
        if any(f"layers.{layer}." in name for name in values):
            kept = {name: value for name, value in values.items() if f"layers.{layer}." not in name}
            yield f"layer {layer} is ignored", kept


def _renamed(shape: Shape) -> Tensors:
    renamed: Tensors = {}
    for name, value in (shape.tensors or dict)().items():
        for old, new in (shape.under or {}).items():
            name = name.replace(old, new)
        renamed[name] = value
    return renamed


def answer(reading: Reading, base: str, folder: Path) -> LogProbs | None:
    """Return PEFT's answer to a reading; None where PEFT does not load it."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(reading.config))
    if not reading.tensors:
        return None
    save_file(reading.tensors, folder / WEIGHTS)
    try:
        return log_probs(adapted(base, folder, rows_of(reading.tensors)))
    except FAILURES:
        return None


def equal(one: LogProbs, other: LogProbs, tolerance: float) -> bool:
    """Return True if two programs computed the same."""
    return bool(np.abs(one - other).max() <= tolerance)


def explained(shape: Shape, found: LogProbs, folder: Path, tolerance: float) -> tuple[str, list[str]]:
    """Return the reading of an adapter that a program's answer shows, and the tensors that it leaves out.

    Empty where it is none that is known.
    """
    everything = _renamed(shape)
    for number, reading in enumerate(readings(shape)):
        expected = answer(reading, shape.base, folder / str(number))
        if expected is not None and equal(found, expected[: len(found)], tolerance):
            return reading.how, sorted(everything.keys() - reading.tensors.keys())
    return "", []


PICKLED: Final = "adapter_model.bin"


def write(shape: Shape, folder: Path) -> Path:
    """Write a shape, its tensors in a pickle where it has them so, and other files of JSON as such."""
    shape.write(folder)
    for name in shape.files:
        if name.endswith(".json"):
            (folder / name).write_text("{}")
    if PICKLED in shape.files:
        values = load_file(folder / WEIGHTS)
        torch.save({name: torch.from_numpy(value) for name, value in values.items()}, folder / PICKLED)
        (folder / WEIGHTS).unlink()
    return folder


# Kinds that PEFT itself makes: the wild shapes have only their configs.
_PROMPTS: Final = {"num_virtual_tokens": 4}
_DRAWN: Final[dict[str, dict[str, Any]]] = {
    "BOFT": {"boft_block_size": 4}, "OFT": {}, "HRA": {}, "FOURIERFT": {"n_frequency": 100}, "DELORA": {},
    "VBLORA": {"vector_length": 16, "num_vectors": 32}, "RANDLORA": {}, "SHIRA": {"r": 2}, "LOKR": {},
    "POLY": {"n_tasks": 2}, "LN_TUNING": {}, "PROMPT_TUNING": _PROMPTS, "PREFIX_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS | {"encoder_hidden_size": 16},
}  # fmt: skip


def drawn(shape: Shape) -> Shape:
    """Return a shape of another kind with the tensors that PEFT saves of it; any other shape as it is."""
    if PICKLED in shape.files:
        return wide(replace(shape, tensors=made))
    kind = (shape.config or {}).get("peft_type")
    if kind not in _DRAWN or (shape.tensors is not None and kind != "LOKR"):
        return wide(shape)
    fields = _DRAWN[kind] | {
        name: value for name, value in (shape.config or {}).items() if name in ("r", "decompose_both")
    }
    if "virtual" not in str(fields):
        fields["target_modules"] = ["input_layernorm"] if kind == "LN_TUNING" else ["q_proj", "v_proj"]
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](task_type="CAUSAL_LM", **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base_of(shape.base)), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    values = {
        name: value.detach().contiguous().numpy()
        for name, value in peft.get_peft_model_state_dict(model).items()
    }
    written = {
        name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()
    }
    return replace(shape, config=json.loads(json.dumps(written, default=str)), tensors=lambda: values, files=())
