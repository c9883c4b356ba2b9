"""Contenders without a server, each a process of its own that answers loads in turn with the servers.

    python -m benchmarks.peer engine STORE DEPLOYMENT BASE
    python -m benchmarks.peer peft BASE ADAPTERS NAME ...

`engine` is the engine alone, without an API and an event loop: the speed of a server if they cost nothing.
`peft` is transformers + PEFT, one static batch that mixes the named adapters; without names transformers alone.
"""

import asyncio
import json
import math
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Final, Self

import torch

Load = dict[str, Any]
"""``models``, ``prompts``, ``concurrency`` and ``new`` tokens of each prompt."""
Measure = Callable[[Load], tuple[float, float]]
"""A load to tokens per second and the median of the seconds to the first token."""


class Peer:
    """A contender's process."""

    def __init__(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "benchmarks.peer", *map(str, arguments)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)  # noqa: S603 - our own

    async def load(self, models: Sequence[str], prompts: Sequence[str], concurrency: int, new: int) -> Any:
        """Have one load done."""
        load = {"models": list(models), "prompts": list(prompts), "concurrency": concurrency, "new": new}
        return json.loads(await asyncio.to_thread(self._ask, json.dumps(load)))

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, *_error: object) -> None:
        """End it."""
        with self._process:
            self._process.stdin.close()  # type: ignore[union-attr]  # a pipe

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None  # noqa: S101 - both are pipes
        assert self._process.stdout is not None  # noqa: S101
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


def load_adapters(model: Any, folder: Path, names: Sequence[str]) -> Any:
    """Return a model with the adapters of a folder, as PEFT has them."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    return model.eval()


def peft(base: str, adapters: str, *names: str) -> Measure:
    """Generate for as many prompts as are to be open at once, as one batch; the first token is not seen."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    if names:
        model = load_adapters(model, Path(adapters), names)

    @torch.inference_mode()
    def measure(load: Load) -> tuple[float, float]:
        size, new = load["concurrency"], load["new"]
        batch = tokenizer(load["prompts"][:size], return_tensors="pt", padding=True)
        extra = {"adapter_names": [names[index % len(names)] for index in range(size)]} if names else {}
        began = time.perf_counter()
        out = model.generate(**batch, **extra, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        tokens = (out.shape[1] - batch["input_ids"].shape[1]) * size
        return tokens / (time.perf_counter() - began), math.nan

    return measure


def engine(store: str, deployment: str, base: str) -> Measure:
    """Keep so many sequences under way until all have ended; tokens are encoded before."""
    from inference_service.core.sampling import SamplingParams
    from inference_service.core.sequence import Sequence as EngineSequence
    from inference_service.startup.load import load as load_service
    from loramux_shared.process import log_to_stderr
    from loramux_shared.settings import InferenceSettings
    from loramux_shared.storage.open import open_store

    log_to_stderr()
    settings = InferenceSettings(store=store, deployment=deployment, local_roots=(Path(base),))
    ready, numbers = load_service(settings, open_store(store)), count()

    def measure(load: Load) -> tuple[float, float]:
        engine, inbox = ready.engine._engine, ready.engine.inbox
        adapters = [ready.service.local.catalog.resolve(name).adapter for name in load["models"]]
        longest = ready.service.limits.max_seq_len
        waiting = deque(
            EngineSequence(
                f"{next(numbers)}",
                list(ready.service.text.encode_prompt(prompt, longest, add_special_tokens=True)),
                SamplingParams(max_tokens=load["new"]),
                adapters[index % len(adapters)],
            )
            for index, prompt in enumerate(load["prompts"])
        )
        tokens, firsts, begun = 0, list[float](), dict[str, float]()
        began = time.perf_counter()
        while waiting or not engine.idle:
            inbox.receive(0)
            while waiting and len(begun) < load["concurrency"]:
                seq = waiting.popleft()
                begun[seq.id] = time.perf_counter()
                engine.add(seq)
            for output in engine.step():
                tokens += output.token is not None
                if output.first:
                    firsts.append(time.perf_counter() - begun[output.seq_id])
                if output.finish:
                    del begun[output.seq_id]
        return tokens / (time.perf_counter() - began), statistics.median(firsts)

    return measure


KINDS: Final[Mapping[str, Callable[..., Measure]]] = {"engine": engine, "peft": peft}


def main() -> None:
    """Load, and answer the load of each line; all that was loaded goes with the end of this function."""
    kind, *arguments = sys.argv[1:]
    measure = KINDS[kind](*arguments)
    for line in sys.stdin:
        print(json.dumps(measure(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
