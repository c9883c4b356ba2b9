"""The engine alone, without an API and without an event loop: the speed of a server if they cost nothing.

Arguments: the store, the deployment, the base's folder.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from functools import partial
from itertools import count
from pathlib import Path

from benchmarks.peer import Load, answer
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence
from inference_service.startup.load import Ready, load
from loramux_shared.process import log_to_stderr
from loramux_shared.settings import InferenceSettings
from loramux_shared.storage.open import open_store

_numbers = count()


def main() -> None:
    """Load as the service does, then measure; nothing else is at work in this process."""
    log_to_stderr()
    store, deployment, base = sys.argv[1:]
    settings = InferenceSettings(store=store, deployment=deployment, local_roots=(Path(base),))
    answer(partial(measure, load(settings, open_store(store))))


def measure(ready: Ready, load: Load) -> tuple[float, float]:
    """Keep so many sequences under way until all have ended; tokens are encoded before."""
    engine, inbox = ready.engine._engine, ready.engine._inbox
    encode = ready.service.text.encode_prompt
    adapters = [ready.service.catalog.resolve(name).adapter for name in load["models"]]
    waiting = deque(
        Sequence(
            f"{next(_numbers)}",
            list(encode(prompt, ready.service.limits.max_seq_len, add_special_tokens=True)),
            SamplingParams(max_tokens=load["new"]),
            adapters[index % len(adapters)],
        )
        for index, prompt in enumerate(load["prompts"])
    )
    tokens, firsts = 0, list[float]()
    began: dict[str, float] = {}
    started = time.perf_counter()
    while waiting or not engine.idle:
        inbox.receive(0)
        while waiting and len(began) < load["concurrency"]:
            seq = waiting.popleft()
            began[seq.id] = time.perf_counter()
            engine.add(seq)
        for output in engine.step():
            tokens += output.token is not None
            if output.first:
                firsts.append(time.perf_counter() - began[output.seq_id])
            if output.finish:
                del began[output.seq_id]
    return tokens / (time.perf_counter() - started), statistics.median(firsts)


if __name__ == "__main__":
    main()
