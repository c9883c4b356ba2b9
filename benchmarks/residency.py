"""Adapters that come and go: what a replica promises of them, measured beside its bars.

Sections are named on the command line; without a name, all are measured. The base is the demo's, adapters
have rank 16 on all seven modules in bfloat16, replicas listen on 127.0.0.1. Most figures are ratios of two
sides that were measured in turn, so that a busy moment hits both; a figure of a machine that does much else
is worth little. The exit status is 1 when a bar is missed.

    python -m benchmarks.residency
    python -m benchmarks.residency turns churn --rounds 5 --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import structlog

from benchmarks.moving import changes, churn, fair, registered, turns
from benchmarks.moving.figures import Figure
from benchmarks.moving.forge import Forge

Section = Callable[[Forge, int], Awaitable[list[Figure]]]
SECTIONS: Final[Mapping[str, Section]] = {
    "turns": turns.measure,
    "churn": churn.measure,
    "registered": registered.measure,
    "fair": fair.measure,
    "push": changes.measure_push,
    "add": changes.measure_add,
}


async def measure(names: Sequence[str], forge: Forge, rounds: int, *, as_json: bool) -> bool:
    """Measure sections, print what was found, and return whether every bar is met."""
    met = True
    for name in names:
        began = time.monotonic()
        figures = await SECTIONS[name](forge, rounds)
        met &= all(figure.met for figure in figures)
        if as_json:
            print("\n".join(json.dumps(figure.as_json(name)) for figure in figures), flush=True)
            continue
        load = os.getloadavg()[0]
        print(f"{name}: {rounds} rounds, {time.monotonic() - began:.0f} s, load average {load:.1f}")
        print("\n".join(f"  {figure}" for figure in figures), flush=True)
    return met


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side of a pair")
    parser.add_argument("--json", action="store_true", help="a line of JSON per figure")
    parser.add_argument("--folder", type=Path, help="keep stores here between runs; else they are temporary")
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with tempfile.TemporaryDirectory(prefix="loramux-residency-") as folder:
        work = options.folder or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        names = options.sections or list(SECTIONS)
        return 0 if asyncio.run(measure(names, Forge(work), options.rounds, as_json=options.json)) else 1


if __name__ == "__main__":
    sys.exit(main())
