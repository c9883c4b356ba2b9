"""A process that serves a base whose file changes under it."""

import json
from pathlib import Path

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence
from inference_service.engine.engine import Engine
from loramux_shared.settings import InferenceSettings
from loramux_shared.storage.open import open_store
from tests.support.tiny import load_replica

WAYS = ({"dtype": "float32"}, {"dtype": "float16", "backend": "torch"})
TOKENS = 8


def answers_while_its_file_changes(root: Path, prompt: list[int]) -> None:
    """Write the answers of the base with a whole file, an overwritten file and a cut file."""
    settings = {"deployment": "tiny", "local_roots": (root,), "kv_memory_gb": 0.01, "prefix_cache": False}
    store = open_store(f"file://{root}/store")
    engines = [load_replica(InferenceSettings(**settings, **way), store).core for way in WAYS]
    answers, file = [_answer(engines, prompt)], root / "base" / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(4096)
        stream.write(bytes(file.stat().st_size - 4096))
    answers.append(_answer(engines, prompt))
    with file.open("r+b") as stream:
        stream.truncate(10)
    answers.append(_answer(engines, prompt))
    (root / "answers.json").write_text(json.dumps(answers))


def _answer(engines: list[Engine], prompt: list[int]) -> list[int]:
    tokens = []
    for engine in engines:
        engine.add(Sequence("0", list(prompt), SamplingParams(max_tokens=TOKENS)))
        while not engine.idle:
            tokens += [output.token.id for output in engine.step()]
    return tokens
