"""transformers + PEFT, one static batch that mixes adapters, no server.

Arguments: the base's folder, that of the adapters, and the names of those that are loaded.
"""

from __future__ import annotations

import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peer import Load, answer


def main() -> None:
    """Load, then measure."""
    base, adapters, *names = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    if names:
        model = PeftModel.from_pretrained(model, Path(adapters) / names[0], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(Path(adapters) / name, adapter_name=name)
        model.eval()
    answer(partial(measure, tokenizer, model, names))


def measure(tokenizer: Any, model: Any, names: list[str], load: Load) -> tuple[float, float]:
    """Generate for as many prompts as are to be open at once, as one batch; the first token is not seen."""
    size, new = load["concurrency"], load["new"]
    batch = tokenizer(load["prompts"][:size], return_tensors="pt", padding=True)
    extra = {"adapter_names": [names[index % len(names)] for index in range(size)]} if names else {}
    started = time.perf_counter()
    out = model.generate(**batch, **extra, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    tokens = (out.shape[1] - batch["input_ids"].shape[1]) * size
    return tokens / (time.perf_counter() - started), math.nan


if __name__ == "__main__":
    with torch.inference_mode():
        main()
