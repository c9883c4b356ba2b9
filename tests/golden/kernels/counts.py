"""Record the output of `benchmarks.counts`: python -m tests.golden.kernels.counts."""

import os
from pathlib import Path

TABLE = Path(__file__).with_name("counts.txt")


def text() -> str:
    from benchmarks import counts  # its kernels are not to be compiled

    return "\n".join(counts.lines()).rstrip("\n") + "\n"


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    TABLE.write_text(text())
