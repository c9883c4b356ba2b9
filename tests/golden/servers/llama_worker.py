"""Runs in an environment with llama.cpp's library: turns adapters into GGUF, and answers with them.

Its arguments are the folder of the scripts, the folder of the base, and the tokens of the prompt. It answers
each line of stdin, a folder of an adapter or an empty line for the base, with a line of JSON.
"""

import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib  # type: ignore[import-not-found]

F32 = 0
"""GGML_TYPE_F32."""
WITHOUT_FLASH = 0
"""LLAMA_FLASH_ATTN_TYPE_DISABLED."""

FAILURES = (
    AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
"""Exceptions of the script; any of them is a refusal, which is recorded."""


def convert(scripts: Path, script: str, *argv: str) -> None:
    """Run a script of llama.cpp as a person would."""
    sys.argv = [script, *argv]
    runpy.run_path(str(scripts / script), run_name="__main__")


def convert_base(scripts: Path, base: Path) -> Path:
    """Turn a base into GGUF, without its tokenizer, which no tokenizer of llama.cpp's is."""
    sys.path[:0] = [str(scripts), str(scripts / "gguf-py")]
    from conversion import (  # type: ignore[import-not-found]
        ModelType,
        get_model_architecture,
        get_model_class,
    )
    from conversion.base import ModelBase  # type: ignore[import-not-found]

    architecture = get_model_architecture(ModelBase.load_hparams(base, False), ModelType.TEXT)
    of_base: Any = get_model_class(architecture)
    own, of_base.set_vocab = of_base.set_vocab, _without_tokenizer
    convert(
        scripts, "convert_hf_to_gguf.py", str(base), "--outfile", str(base / "base.gguf"), "--outtype", "f32"
    )
    of_base.set_vocab = own
    return base / "base.gguf"


def _without_tokenizer(model: Any) -> None:
    model._set_vocab_none()
    model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])


class Model:
    """A model of llama.cpp."""

    def __init__(self, path: Path, prompt: list[int]) -> None:
        self._ffi, self._lib = get_ffi(), get_lib()
        self._lib.llama_backend_init()
        self._prompt = prompt
        self._model = self._lib.llama_model_load_from_file(
            str(path).encode(), self._lib.llama_model_default_params()
        )
        self._vocabulary = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))

    def answer(self, adapter: Path | None) -> list[list[float]]:
        """Return log probabilities at each place; raise ValueError where the library refuses the adapter."""
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads = 64, 64, 64, 1
        params.n_outputs_max, params.type_k, params.type_v = 64, F32, F32
        params.flash_attn_type = WITHOUT_FLASH
        context = self._lib.llama_init_from_model(self._model, params)
        if adapter is not None:
            lora = self._lib.llama_adapter_lora_init(self._model, str(adapter).encode())
            if lora == self._ffi.NULL:
                raise ValueError("llama_adapter_lora_init returned no adapter")
            self._lib.llama_set_adapters_lora(
                context,
                self._ffi.new("struct llama_adapter_lora *[]", [lora]),
                1,
                self._ffi.new("float[]", [1.0]),
            )
        batch = self._lib.llama_batch_init(len(self._prompt), 0, 1)
        batch.n_tokens = len(self._prompt)
        for at, token in enumerate(self._prompt):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = token, at, 1, 0
            batch.logits[at] = 1
        if self._lib.llama_decode(context, batch):
            raise ValueError("llama_decode failed")
        rows = [self._log_softmax(context, at) for at in range(len(self._prompt))]
        self._lib.llama_free(context)
        return rows

    def _log_softmax(self, context: Any, place: int) -> list[float]:
        logits = self._ffi.unpack(self._lib.llama_get_logits_ith(context, place), self._vocabulary)
        total = max(logits) + math.log(sum(math.exp(each - max(logits)) for each in logits))
        return [each - total for each in logits]


def main() -> None:
    """Answer every line."""
    scripts, base = Path(sys.argv[1]), Path(sys.argv[2])
    prompt, answers = [int(word) for word in sys.argv[3:]], sys.stdout
    sys.stdout = sys.stderr  # scripts may print
    model = Model(convert_base(scripts, base), prompt)
    for line in sys.stdin:
        reply: dict[str, Any]
        try:
            out = None
            if folder := line.strip():
                out = Path(folder) / "adapter.gguf"
                convert(scripts, "convert_lora_to_gguf.py", folder, "--base", str(base), "--outfile", str(out))
            reply = {"log_probs": model.answer(out)}
        except SystemExit as end:
            reply = {"refused": f"convert_lora_to_gguf.py: exit status {end.code}"}
        except FAILURES as error:
            reply = {"refused": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
