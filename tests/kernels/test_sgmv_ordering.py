"""What the compiler makes of the fused kernel's waiting: the interpreter shows no races, the code does."""

import json
import os
import re
import subprocess
import sys
from itertools import groupby

import pytest

from inference_service.kernels.launch import ARCHITECTURES

PRINT = """
import json, sys
from tests.kernels.aot import compiled, variants
architecture = int(sys.argv[1])
fused = [each for each in variants(architecture, ["sgmv"]) if each.name.startswith("sgmv.fused")]
print(json.dumps([compiled(architecture, variant).asm["ptx"] for variant in fused[:: int(sys.argv[2])]]))
"""
EVENTS = {
    "store": r"st\.global",
    "barrier": r"bar\.sync",
    "release": r"red\.global\.gpu\.release\.add",
    "acquire": r"ld\.global\.gpu\.acquire",  # what the compiler makes of adding 0
    "load_y": r"ld\.global\.cg",
    "leave": r"atom\.global\.gpu\.acq_rel\.add",
    "clear": r"atom\.global\.gpu\.relaxed\.exch",
}
SHRINK = ["barrier", "store", "barrier", "release"]
EXPAND = ["barrier", "acquire", "barrier", "load_y", "barrier", "store", "barrier", "leave", "barrier", "clear"]


USUAL = 90, 4
"""The architecture of every run, and of which of its kernels one is compiled; all are in a sweep."""


def codes_for(architecture: int, every: int) -> list[str]:
    """The code of one of so many fused kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    printed = subprocess.run(
        [sys.executable, "-c", PRINT, str(architecture), str(every)],
        env=environment | {"TRITON_DEFAULT_FP_FUSION": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    found: list[str] = json.loads(printed.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("architecture", "every"),
    [USUAL, *(pytest.param(each, 1, marks=pytest.mark.sweep) for each in ARCHITECTURES)],
)
def test_y_is_released_and_acquired_between_barriers(architecture: int, every: int) -> None:
    """Threads store y, meet, release; acquire, meet, load y; meet, leave: and no load of y is moved forward."""
    codes = codes_for(architecture, every)
    event = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in EVENTS.items()))
    for code in codes:
        order = [name for name, _ in groupby(match.lastgroup for match in event.finditer(code))]
        assert order == SHRINK + EXPAND
    assert len(codes) == -(-5 // every)
