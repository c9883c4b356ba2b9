"""``python -m tests.fuzz TARGET --seconds N``: looks for bytes that break a parser, guided by its branches.

It needs the extra ``fuzz`` (Atheris, which is libFuzzer for Python). Inputs that reached something new are kept
below ``build/fuzz/``, and so is the one that broke a promise, which the last lines name.
"""

import argparse
import sys
from random import Random

import atheris

from tests.support.root import ROOT

TIMEOUT_S = 30
MEMORY_MB = 4096


def main() -> None:
    """Fuzz one target; libFuzzer ends the process."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=600)
    options = parser.parse_args()
    with atheris.instrument_imports(
        include=["builder_service", "inference_service", "jinja2", "loramux_shared"]
    ):
        from tests.fuzz.targets import TARGETS, opened  # what is imported here is followed
    target = TARGETS.get(options.target) or parser.error(f"TARGET is one of {', '.join(TARGETS)}")
    corpus = ROOT / "build" / "fuzz" / options.target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = Random(seed)
        made = target.case(rng) if rng.random() < 0.3 else atheris.Mutate(data, most)
        return made[:most]

    limits = {
        "max_total_time": options.seconds,
        "timeout": TIMEOUT_S,
        "rss_limit_mb": MEMORY_MB,
        "max_len": 1 << 17,
    }
    flags = [f"-{name}={value}" for name, value in limits.items()]
    flags += ["-print_final_stats=1", f"-artifact_prefix={corpus.parent}/{options.target}-"]
    with opened(options.target) as judge:

        def judge_one(data: bytes) -> None:
            judge(data)

        atheris.Setup([sys.argv[0], str(corpus), *flags], judge_one, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
