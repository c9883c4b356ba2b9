"""Tensors: keys that mean something else, shapes of other bases, values that cannot be stored."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.golden.hostile.exhibit import (
    BASE,
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
from tests.support.adapters import HIDDEN, VOCAB, Tensors, key, tensors
from tests.support.cases import cases

HEAD, EMBED = "base_model.model.lm_head", f"{ROOT}embed_tokens"
SCORE = "base_model.model.score.weight"
Q = f"{ROOT}layers.0.self_attn.q_proj"


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


def _shaped(name: str, codes: str, *shape: int) -> Exhibit:
    return _changed(name, codes, lambda _: np.ones(shape, "f2"))


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


def _beside(value: float, dtype: str = "f4", rows: int = 8) -> Callable[[Path], None]:
    """Return what writes a product that would drown most bases, beside a weight of the base of such values."""

    def write(folder: Path) -> None:
        adapter(folder, tensors() | {key(1, "v_proj", "A"): np.full((4, 16), 1e4, "f4")})
        weight = {"model.layers.1.self_attn.v_proj.weight": np.full((rows, 16), value, dtype)}
        save_file(
            {"model.embed_tokens.weight": embeddings(), **weight}, folder.parent / BASE / "model.safetensors"
        )

    return write


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


def _classifier(
    name: str,
    codes: str,
    shape: Any = (3, HIDDEN),
    dtype: str = "f4",
    value: Any = 1,
    key: str = SCORE,
    **config: Any,
) -> Exhibit:
    """An adapter that was trained to classify, with a head."""
    head = np.full(shape, float(value), dtype)
    config = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]} | config
    return exhibit(name, codes, lambda folder: adapter(folder, tensors() | {key: head}, **config))


def _fused(name: str, codes: str, *ceiling: str, beside: Mapping[str, int] = MappingProxyType({})) -> Exhibit:
    """An adapter of fused queries, keys and values, and of modules of these widths beside."""
    widths, stem = {"qkv_proj": 2 * HIDDEN, **beside}, Q.removesuffix("q_proj")
    made: Tensors = {}
    for leaf, out in widths.items():
        made[f"{stem}{leaf}.lora_A.weight"] = np.ones((4, HIDDEN), "f2")
        made[f"{stem}{leaf}.lora_B.weight"] = np.ones((out, 4), "f2")
    base = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
    lora = {"lora_target_modules": list(ceiling)}
    return exhibit(
        name, codes, lambda folder: adapter(folder, made, target_modules=list(widths)), base=base, lora=lora
    )


def _of_data(name: str) -> tuple[Exhibit, ...]:
    """Exhibits of the JSON file, by the function that makes them."""
    makers = (_one, _renamed, _of_none, _tokens, _classifier, _fused, _shaped)
    return tuple(
        make(*row, **more) for make in makers for *row, more in cases(__file__, name).get(make.__name__, ())
    )


REFUSED = (
    *_of_data("REFUSED"),
    of_tensors("no tensors", "E_EMPTY_WEIGHTS", dict),
    exhibit("no tensors and no targets", "E_EMPTY_TARGETS", lambda at: adapter(at, {}, target_modules=[])),
    of_tensors("ZeRO-3", "E_EMPTY_WEIGHTS", lambda: {k: np.zeros((0,), "f2") for k in tensors()}),
    of_tensors("tensors with a dimension of zero", "E_EMPTY_WEIGHTS",
               lambda: plus(key(0, "o_proj", "A"), (0, 16), pair=(16, 0))),
    _one("a key of a million dots", "E_UNKNOWN_KEY", f"{ROOT}{'layers.0.' * 100_000}x.lora_A.weight."),
    of_tensors("two adapters", "E_ADAPTER_INFIX",
               lambda: plus(key(1, "o_proj", "A").replace("_A", "_A.second"), pair=(16, 4))),
    of_tensors("beyond the ceiling", "E_MODULE", tensors, lora={"lora_target_modules": ["attn_q"]}),
    of_tensors("A alone", "E_PAIR", lambda: _without(key(1, "v_proj", "B"))),
    of_tensors("B alone", "E_PAIR", lambda: _without(key(1, "v_proj", "A"))),
    of_tensors("a deeper base", "E_LAYER", lambda: tensors(layers=3)),
    of_tensors("layer 999,999", "E_LAYER", lambda: plus(key(999_999, "q_proj", "A"), pair=(16, 4))),
    of_tensors("above the ceiling", "E_RANK_MAX", tensors, lora={"max_lora_rank": 3}),
    of_tensors("LoRA of a tower's embeddings", "E_PREFIX",
               lambda: plus("base_model.model.tower.embed_tokens.lora_embedding_A")),
    exhibit("NaN in a saved head", "E_NAN", _saved(
        lambda: np.full((VOCAB, HIDDEN), np.nan, "f2"), f"{EMBED}.weight")),
    exhibit("embeddings in int8", "E_EMBED", _saved(lambda: embeddings().astype("i1"), f"{EMBED}.weight")),
    exhibit("DoRA of other widths", "E_DIMS", _magnitudes(17)),
    exhibit("DoRA, and no weights of the base", "E_DORA", _magnitudes(16)),
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
    *_of_data("ACCEPTED"),
    exhibit("trained embeddings", "", _saved(lambda: 2 * embeddings(), f"{EMBED}.weight")),
    exhibit("embeddings of minus zero", "", _saved(lambda: -embeddings(), f"{EMBED}.weight")),
    exhibit("embeddings and nothing else", "W_TARGETS", lambda folder: adapter(
        folder, {f"{EMBED}.weight": np.ones((VOCAB, HIDDEN), "f2")}, modules_to_save=["embed_tokens"])),
    of_tensors("B is zero", "W_ZERO_B", lambda: _zero("B")),
    of_tensors("A is zero", "W_ZERO_B", lambda: _zero("A")),
    of_tensors("a product that drowns the base", "W_MAGNITUDE", lambda: tensors() | {
        key(1, "v_proj", "A"): np.full((4, 16), 1e4, "f4")}, lora={"dtype": "float32"}),
    exhibit("a product beside larger weights", "", _beside(1e6), lora={"dtype": "float32"}),
    exhibit("a product beside integers", "W_MAGNITUDE", _beside(2**31, "i8"), lora={"dtype": "float32"}),
    exhibit("a product beside too few rows", "W_MAGNITUDE", _beside(1e6, rows=4), lora={"dtype": "float32"}),
    of_tensors("cut to rank 2", "W_TRUNCATED", tensors, lora={"truncate_to_rank": 2}),
    exhibit("o_proj of narrow heads", "W_ODENSE",
            lambda folder: adapter(folder, _wide_o_proj(), target_modules=["o_proj"]),
            base={"hidden_size": 2 * HIDDEN, "head_dim": 4}),
    exhibit("the base's own embeddings", "W_REDUNDANT_EMBED", _saved(embeddings, f"{EMBED}.weight")),
    exhibit("the same, raw and wide", "W_REDUNDANT_EMBED", _saved(
        lambda: embeddings().astype("f4"), f"{EMBED}.modules_to_save.default.weight",
        f"{EMBED}.original_module.weight", f"{HEAD}.base_layer.weight")),
    of_tensors("a tower of a model with images", "W_TOWER",
               lambda: plus(_TOWER, pair=(16, 4)), base=BASES["gemma3"]),
)  # fmt: skip
