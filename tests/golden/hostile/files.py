"""Folders: missing files, files of other programs, files that must not run."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.golden.hostile.exhibit import WEIGHTS, adapter, exhibit, of_files
from tests.support.adapters import tensors
from tests.support.cases import cases

INDEX = f"{WEIGHTS}.index.json"
ONE_SHARD = "adapter_model-00001-of-00001.safetensors"

SIGNERS = ("sigstore:https://issuer.example.com#release@example.com",)
CANARY = "canary-ran"
"""A file that is there once the canary's pickle was loaded."""


class _Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (self._path, "it ran"))


def _canary(*names: str) -> Any:
    def make(folder: Path) -> None:
        adapter(folder)
        (folder / WEIGHTS).unlink()
        for name in names:
            (folder / name).write_bytes(pickle.dumps(_Canary(folder / CANARY)))

    return make


def _text(name: str, text: str) -> Any:
    def make(folder: Path) -> None:
        adapter(folder)
        (folder / name).write_text(text)

    return make


def _beside(*names: str) -> Any:
    def make(folder: Path) -> None:
        adapter(folder)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")

    return make


def _sharded(index: Callable[[dict[str, str]], Any]) -> Any:
    """Write one file of weights under the name of a shard, and an index of its tensors."""

    def make(folder: Path) -> None:
        adapter(folder)
        shard = (folder / WEIGHTS).rename(folder / ONE_SHARD)
        (folder / INDEX).write_text(json.dumps(index(dict.fromkeys(tensors(), shard.name))))

    return make


REFUSED = (
    *(of_files(*row, **more) for *row, more in cases(__file__, "REFUSED")["of_files"]),
    exhibit("a pickle with a canary", "E_BIN_ONLY", _canary("adapter_model.bin")),
    exhibit("pickles of all names", "E_BIN_ONLY", _canary("adapter_model.pt", "adapter_model.pth", "opt.pt")),
    exhibit("an index that is a list", "E_BAD_WEIGHTS", _sharded(lambda places: list(places))),
    exhibit("an index that names another file", "E_BAD_WEIGHTS", _sharded(
        lambda places: {"weight_map": dict.fromkeys(places, "../../base/model.safetensors")})),
    exhibit("an index of more tensors", "E_BAD_WEIGHTS", _sharded(
        lambda places: {"weight_map": places | {"x.lora_A.weight": ONE_SHARD}})),
    exhibit("an index of 30,000 tensors", "E_TENSORS", _sharded(
        lambda places: {"weight_map": places | {f"x{i}": "y" for i in range(30_000)}})),
    exhibit("template that is no text", "E_BAD_TEXT", lambda folder: (
        adapter(folder) / "chat_template.jinja").write_bytes(b"\xff\xfe")),
    exhibit("added tokens", "E_EMBED", _text("added_tokens.json", '{"<tool>": 32}')),
    exhibit("added tokens as a list", "E_BAD_TEXT", _text("added_tokens.json", '["<tool>"]')),
    exhibit("added tokens cut off", "E_BAD_TEXT", _text("added_tokens.json", "{")),
    exhibit("a tokenizer's added tokens", "E_EMBED", _text(
        "tokenizer.json", '{"added_tokens": [{"id": 32, "content": "<tool>"}]}')),
    exhibit("a tokenizer config's added tokens", "E_EMBED", _text(
        "tokenizer_config.json", '{"added_tokens_decoder": {"32": {"content": "<tool>"}}}')),
    exhibit("a larger vocabulary", "E_EMBED", _text(
        "tokenizer.json", json.dumps({"model": {"vocab": {f"t{i}": i for i in range(33)}}}))),
    exhibit("a tokenizer that is no text", "E_BAD_TEXT", _text("tokenizer.json", "x")),
    exhibit("a tokenizer of brackets", "E_BAD_TEXT", _text("tokenizer.json", "[" * 100_000)),
    exhibit("a token with half a character", "E_EMBED", _text("added_tokens.json", '{"\\ud800": 32}')),
    exhibit("a signature that is not there", "E_SIGNATURE", adapter, signed_by=SIGNERS),
    exhibit("an endless signature", "E_SIGNATURE", _text("model.sig", " " * 5_000_000), signed_by=SIGNERS),
    exhibit("temperature as text", "E_BAD_TEXT", _text("generation_config.json", '{"temperature": "warm"}')),
)  # fmt: skip

ACCEPTED = (
    exhibit("a trainer's leftovers", "W_EXTRA_FILES",
            _beside("optimizer.pt", "trainer_state.json", "rng_state_0.pth", "checkpoint-1/adapter_model.bin")),
    exhibit("weights of another kind beside", "W_EXTRA_FILES", _beside("adapter_model.bin")),
    exhibit("a shard alone", "", _sharded(lambda places: {"metadata": {}, "weight_map": places})),
    exhibit("a tokenizer beside", "", _beside("README.md", "vocab.json", "tokenizer.model")),
    exhibit("added tokens of the base", "", _text("added_tokens.json", json.dumps({"<a>": 3, "<b>": 31}))),
    exhibit("a licence that the base has not", "W_LICENSE", _text("README.md", "---\nlicense: mit\n---\n")),
    exhibit("front matter of brackets", "", _text("README.md", "---\nlicense: " + "[" * 30_000 + "\n---\n")),
    exhibit("beams", "W_GENERATION", _text("generation_config.json", '{"num_beams": 4}')),
)  # fmt: skip
