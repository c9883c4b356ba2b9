"""Folders: missing files, files of other programs, files that must not run."""

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.golden.hostile.exhibit import WEIGHTS, Exhibit, adapter, exhibit, of_files
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


def _text(name: str, codes: str, file: str, text: str, **settings: Any) -> Exhibit:
    return exhibit(name, codes, lambda folder: (adapter(folder) / file).write_text(text), **settings)


def _sharded(index: Callable[[dict[str, str]], Any]) -> Any:
    """Write one file of weights under the name of a shard, and an index of its tensors."""

    def make(folder: Path) -> None:
        adapter(folder)
        shard = (folder / WEIGHTS).rename(folder / ONE_SHARD)
        (folder / INDEX).write_text(json.dumps(index(dict.fromkeys(tensors(), shard.name))))

    return make


def _of_data(name: str) -> Iterator[Exhibit]:
    for make in (of_files, _text):
        yield from (make(*row, **more) for *row, more in cases(__file__, name)[make.__name__])


REFUSED = (
    *_of_data("REFUSED"),
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
    _text("a larger vocabulary", "E_EMBED", "tokenizer.json",
          json.dumps({"model": {"vocab": {f"t{i}": i for i in range(33)}}})),
    _text("a tokenizer of brackets", "E_BAD_TEXT", "tokenizer.json", "[" * 100_000),
    exhibit("a signature that is not there", "E_SIGNATURE", adapter, signed_by=SIGNERS),
    _text("an endless signature", "E_SIGNATURE", "model.sig", " " * 5_000_000, signed_by=SIGNERS),
)  # fmt: skip

ACCEPTED = (
    *_of_data("ACCEPTED"),
    exhibit("a shard alone", "", _sharded(lambda places: {"metadata": {}, "weight_map": places})),
    _text("front matter of brackets", "", "README.md", "---\nlicense: " + "[" * 30_000 + "\n---\n"),
)
