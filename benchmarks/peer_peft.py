"""The peer of serving.py: transformers + PEFT, one static batch that mixes adapters, no server.

Reads a JSON object from stdin (names of adapters, loads as [batch size, prompts], new tokens), prints tokens
per second of each load, best of three.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Measure every load."""
    base, adapters = map(Path, sys.argv[1:3])
    given = json.load(sys.stdin)
    names = given["names"]
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    if names:
        model = PeftModel.from_pretrained(model, adapters / names[0], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(adapters / name, adapter_name=name)
        model.eval()
    speeds = []
    for size, prompts in given["loads"]:
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        extra = {"adapter_names": [names[index % len(names)] for index in range(size)]} if names else {}
        best = 0.0
        for _ in range(3):
            started = time.perf_counter()
            out = model.generate(
                **batch, **extra, max_new_tokens=given["new"], min_new_tokens=given["new"], do_sample=False
            )
            tokens = (out.shape[1] - batch["input_ids"].shape[1]) * size
            best = max(best, tokens / (time.perf_counter() - started))
        speeds.append(best)
    print(json.dumps(speeds))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
