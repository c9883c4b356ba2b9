"""A sweep over other programs: each answers with every shape, and its answers are compared with PEFT's.

::

    python -m tests.golden.servers.sweep peft
    python -m tests.golden.servers.sweep vllm --python ENVIRONMENT/bin/python
    python -m tests.golden.servers.sweep llama.cpp --python ENVIRONMENT/bin/python --scripts LLAMA_CPP

write what they found into ``outcomes.json``. vLLM's environment has its build for CPUs, that of llama.cpp
`llama-cpp-py-sync`, torch, transformers and cffi; LLAMA_CPP is a checkout of it. CI runs none of them: it
compares the rules with the file.
"""

import argparse
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import peft
from peft.utils.save_and_load import load_peft_weights

from tests.golden.servers.folders import write_base
from tests.golden.servers.llama_cpp import LlamaCpp
from tests.golden.servers.probes import TRIED
from tests.golden.servers.reference import (
    FAILURES,
    TOLERANCE,
    LogProbs,
    adapted,
    base_of,
    drawn,
    equal,
    explained,
    log_probs,
    right,
    rows_of,
    write,
)
from tests.golden.servers.vllm_server import Refused, VllmServer
from tests.golden.wild.shape import Shape

OUTCOMES: Final = Path(__file__).with_name("outcomes.json")
MAX_MESSAGE: Final = 300
MAX_DIFFERENCE: Final = 0.1
"""Largest difference of a log probability without an adapter: llama.cpp's GELU is a table in half precision."""
NO_PLACE: Final = "no module takes them"
Outcome = dict[str, Any]
Ask = Callable[[Shape, Path], LogProbs]
"""Answers of a program with an adapter; raises Refused."""


def judged(shape: Shape, folder: Path, ask: Ask, base: LogProbs, tolerance: float) -> Outcome:
    """Return what a program makes of an adapter."""
    write(shape, folder / "own")
    try:
        found = ask(shape, folder / "own")
    except Refused as refusal:
        return {"outcome": "refused", "message": cleaned(str(refusal), folder)}
    base, expected = base[: len(found)], right(shape, folder / "right")
    means_nothing = "W_ZERO_B" in shape.codes or shape.what == "all B zero"
    if (
        expected is not None
        and equal(found, expected[: len(found)], tolerance)
        and (means_nothing or not equal(found, base, tolerance))
    ):
        ignored = ignored_by_peft(shape, folder / "right")
        return {"outcome": "partly", "how": NO_PLACE, "ignored": ignored} if ignored else {"outcome": "exact"}
    if equal(found, base, tolerance):
        return {"outcome": "nothing"}
    how, ignored = explained(shape, found, folder / "readings", tolerance)
    return {"outcome": "partly" if ignored else "other", "how": how, "ignored": ignored}


def cleaned(message: str, folder: Path) -> str:
    """Return a message without folders of this machine, in an order that does not change."""
    message = message.replace(str(folder / "own"), "ADAPTER").replace(str(folder), "FOLDER")
    message = re.sub(
        r"\{('[^{}]*')\}", lambda found: "{" + ", ".join(sorted(found[1].split(", "))) + "}", message
    )
    return " ".join(message.split())[:MAX_MESSAGE]


def ask_peft(shape: Shape, folder: Path) -> LogProbs:
    """Load the very files with PEFT."""
    try:
        return log_probs(adapted(shape.base, folder))
    except FAILURES as error:
        raise Refused(f"{type(error).__name__}: {error}") from error


def ignored_by_peft(shape: Shape, folder: Path) -> list[str]:
    """Return the tensors that no module of the base takes, of which PEFT says nothing."""
    if "prompt_embeddings" in (shape.tensors or dict)():
        return []
    model = adapted(shape.base, folder, rows_of((shape.tensors or dict)()))
    try:
        result = peft.set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    except IndexError:  # AdaLoRA allocates its ranks once
        return []
    return sorted(result.unexpected_keys)


def run(
    shapes: Iterable[Shape], ask: Ask, base: LogProbs, part: str, tolerance: float = TOLERANCE
) -> dict[str, Outcome]:
    """Return the outcomes of shapes at a program."""
    found: dict[str, Outcome] = {}
    for shape in shapes:
        if part not in shape.name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            made = drawn(shape)
            outcome = judged(made, Path(folder), ask, base, tolerance)
        logging.info("%s: %s", shape.name, outcome)
        found[shape.name] = outcome
    return found


def main() -> None:
    """Ask one program, and write its outcomes beside those of the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", choices=("peft", "vllm", "llama.cpp"))
    parser.add_argument("--python", type=Path, help="the interpreter of the program's environment")
    parser.add_argument("--scripts", type=Path, help="llama.cpp's folder with its scripts")
    parser.add_argument("--shape", default="", help="a part of the names of shapes")
    parser.add_argument("--base", action="append", help="the bases; all of them without it")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in options.base or sorted({shape.base for shape in TRIED}):
        shapes = [shape for shape in TRIED if shape.base == name]
        write_outcomes(options.program, version_of(options), outcomes_of(options, name, shapes))


def outcomes_of(options: argparse.Namespace, name: str, shapes: list[Shape]) -> dict[str, Outcome]:
    """Start a program on a base, and ask it about all shapes of that."""
    base = log_probs(base_of(name))
    if options.program == "peft":
        return run(shapes, ask_peft, base, options.shape)
    with tempfile.TemporaryDirectory() as folder:
        files = write_base(name, Path(folder) / name)
        started = (
            LlamaCpp(options.python, options.scripts, files)
            if options.program == "llama.cpp"
            else VllmServer(options.python, files, 8150 + len(name))
        )
        with started as program:
            tolerance = tolerance_of(program.log_probs(), base)
            return run(shapes, lambda _, adapter: program.try_adapter(adapter), base, options.shape, tolerance)


def tolerance_of(found: LogProbs, base: LogProbs) -> float:
    """Return how much a program's answers may differ, from how much those of the base alone do."""
    difference = float(abs(found - base[: len(found)]).max())
    if difference > MAX_DIFFERENCE:
        raise SystemExit(f"without an adapter the program answers otherwise: {difference}")
    return max(TOLERANCE, 4 * difference)


def version_of(options: argparse.Namespace) -> str:
    """Return the version of the program that was asked."""
    if options.program == "peft":
        return version("peft")
    if options.program == "llama.cpp":
        return LlamaCpp.version(options.python)
    return VllmServer.version(options.python)


def write_outcomes(program: str, number: str, found: dict[str, Outcome]) -> None:
    """Write the outcomes of a program into the file of all."""
    known = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {"versions": {}, "outcomes": {}}
    known["versions"][program] = number
    for name, outcome in found.items():
        known["outcomes"].setdefault(name, {})[program] = outcome
    known["outcomes"] = {
        shape.name: dict(sorted(known["outcomes"][shape.name].items()))
        for shape in TRIED
        if shape.name in known["outcomes"]
    }
    OUTCOMES.write_text(f"{json.dumps(known, indent=1)}\n")


if __name__ == "__main__":
    main()
