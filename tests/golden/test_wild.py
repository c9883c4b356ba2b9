import copy
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from loramux_shared.bundle.modules import BY_NAME
from loramux_shared.faults import AdapterInvalid
from tests.golden.wild.bases import BASES
from tests.golden.wild.shape import NAME, Shape
from tests.golden.wild.shapes import SHAPES
from tests.support.adapters import HIDDEN, VOCAB
from tests.support.folders import context_of, deployment_of, local_source, run_build

Deltas = dict[str, np.ndarray[Any, Any]]


def judged(shape: Shape, folder: Path) -> tuple[list[str], Deltas]:
    """Build a shape through the whole pipeline; return its codes, and its updates to each module."""
    base = folder / NAME
    base.mkdir()
    (base / "config.json").write_text(json.dumps(BASES[shape.base]))
    weights = {"model.embed_tokens.weight": np.zeros((VOCAB, HIDDEN), "f4")}
    if shape.base == "llama":  # which magnitudes are beside
        retained = model_of(shape.base).state_dict().items()
        weights |= {name: values.numpy() for name, values in retained if "self_attn" in name}
    save_file(weights, base / "model.safetensors")
    shape.write(folder / "one")
    lora = {"dtype": "float32", "max_lora_rank": shape.max_rank}
    required = deployment_of(folder, "one", checkpoint_repository=local_source(base), lora_configuration=lora)
    context = context_of(folder)
    try:
        done = run_build(required, context)
    except AdapterInvalid as refusal:
        assert list(context.store.list("")) == []
        return [finding.code for finding in refusal.findings], {}
    deltas: Deltas = {}
    bundle = done.bundle()
    covered = bundle.manifest.coverage
    assert shape.tensors is not None
    assert sorted((*covered.used, *covered.redundant)) == sorted(shape.tensors())
    for row in bundle.rows:
        path = BY_NAME[row.row.module].path
        place = f"layers.{row.row.layer}.{path}"
        if row.row.expert is not None:
            place = f"layers.{row.row.layer}.mlp.experts.{row.row.expert}.{path.rpartition('.')[2]}"
        if not row.row.rank:  # vectors alone: c is the first, and what rounding took from it the third
            deltas[f"{place} scale"] = np.asarray(row.vectors[::2], np.float64).sum(0) - 1
            continue
        deltas[place] = np.asarray(row.b, np.float64) @ np.asarray(row.a, np.float64)
    return [finding.code for finding in done.warnings()], deltas


@cache
def model_of(base: str) -> Any:
    fields = BASES[base]
    config = transformers.AutoConfig.for_model(**fields)
    return getattr(transformers, fields["architectures"][0])(config)


def _rows(shape: Shape) -> int:
    """The tokens that the embeddings beside an adapter have rows for."""
    tensors = {} if shape.tensors is None else shape.tensors()
    return next((len(each) for name, each in tensors.items() if name.endswith("embed_tokens.weight")), VOCAB)


def of_peft(shape: Shape, folder: Path) -> Deltas:
    """Return the part that PEFT adds to each module that it loads the adapter into."""
    files = shape.write(folder / "own") if shape.under is None else shape.write_for_peft(folder / "renamed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = copy.deepcopy(model_of(shape.base))
        if (rows := _rows(shape)) != VOCAB:
            base.resize_token_embeddings(rows)
        model = peft.PeftModel.from_pretrained(base, files)
    found: Deltas = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) and hasattr(module, "get_delta_weight"):
            with torch.no_grad():
                delta = module.get_delta_weight("default").double().numpy()
            found |= parts(name.rpartition("language_model.")[2].removeprefix("base_model.model.model."), delta)
        elif isinstance(module, peft.tuners.ia3.IA3Layer):
            place = name.removeprefix("base_model.model.model.")
            place = place.replace("down_proj", "up_proj") if module.is_feedforward else place
            scale = module.ia3_l["default"].detach().double().numpy().flatten()
            found[f"{place} scale"] = scale - 1
    return {place: delta for place, delta in found.items() if delta.any() and place.startswith("layers.")}


def parts(place: str, delta: np.ndarray[Any, Any]) -> Deltas:
    """Split fused tensors into modules, and tensors of all experts into experts."""
    layer, _, leaf = place.rpartition(".")
    names: tuple[str, ...]
    cuts: list[int]
    if leaf == "qkv_proj":
        names, cuts = ("q_proj", "k_proj", "v_proj"), [HIDDEN, HIDDEN * 3 // 2]
    elif leaf == "gate_up_proj":
        names, cuts = ("gate_proj", "up_proj"), [len(delta) // 2]
    elif leaf == "base_layer":  # the inner one of two wrappers of experts
        fused = (parts(f"{layer}.{at}.gate_up_proj", each) for at, each in enumerate(delta))
        return {name: each for pair in fused for name, each in pair.items()}
    elif leaf == "experts":
        return {f"{place}.{number}.down_proj": each for number, each in enumerate(delta)}
    else:
        return {place: delta}
    return {f"{layer}.{name}": each for name, each in zip(names, np.split(delta, cuts), strict=True)}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name.replace(" ", "-"))
def test_every_shape_is_exact_or_refused_by_name(tmp_path, shape):
    """A program's files give PEFT's result, or the codes of the table."""
    codes, deltas = judged(shape, tmp_path)
    assert sorted(codes) == sorted(shape.codes.split())
    if shape.refused:
        return
    expected = of_peft(shape, tmp_path)
    changing = {place: delta for place, delta in deltas.items() if delta.any()}
    assert sorted(changing) == sorted(expected)
    for place, delta in expected.items():
        np.testing.assert_allclose(changing[place], delta, rtol=0, atol=1e-6 * np.abs(delta).max())
