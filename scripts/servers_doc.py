"""docs/reference/servers.md, from what other servers did with every shape, and from the rules."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loramux.servers.verdicts import Outcome, rules_of, servers
from tests.golden.servers.probes import TRIED

FILE: Final = Path(__file__).parent.parent / "tests/golden/servers/outcomes.json"
RUN: Final = ("vllm", "llama.cpp", "peft")
WORDS: Final = {"nothing": "**ignores all**", "other": "**something else**", "refused": "refuses"}
HEAD: Final = """\
# Other servers

<!-- Written by scripts/servers_doc.py from tests/golden/servers and loramux/servers: `make docs`. -->

Find what vLLM, llama.cpp and PEFT make of your adapter. `loramux check ADAPTER --for vllm` says it of a folder
([check](adapters.md#for-other-servers)); [adapters that do nothing](../guides/adapters-that-do-nothing.md) has
causes and cures.

{wild} shapes that trainers write and {own} of our own were loaded into each, on a small random base. The
log probabilities of a text were compared with those of transformers and PEFT in float32, and with those of
the base alone. *Exact*: the server computes what the adapter means, whether or not PEFT knows its keys. vLLM
is its build for CPUs, which has no LoRA of experts; llama.cpp is its script and its library.

{totals}
## What was tried

Shapes that are exact everywhere are left out. "-" was not tried.

"""
RULES: Final = """\

## Silent rules

Rules by which a server answers, and wrongly, or not with the whole adapter. "read" means that the source was
read, and nobody ran it: SGLang {sglang}, TensorRT-LLM {trt}. A server that refuses says so itself.

"""


def page() -> str:
    """Return the whole page."""
    known = json.loads(FILE.read_text())
    found: Mapping[str, Mapping[str, Any]] = known["outcomes"]
    own = sum(shape.writer == "probe" for shape in TRIED)
    totals = _row("server", "exact", "refused", "silently wrong") + _row(*["---"] * 4)
    totals += "".join(_total(name, found) for name in RUN)
    head = HEAD.format(wild=len(TRIED) - own, own=own, totals=totals)
    rules = RULES.format(sglang=servers()["sglang"].version, trt=servers()["tensorrt-llm"].version)
    return head + _shapes(found) + rules + _rules()


def _total(server: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a row with the numbers of shapes that a server takes in each way."""
    counts = Counter(each[server]["outcome"] for each in found.values() if server in each)
    silent = counts["nothing"] + counts["partly"] + counts["other"]
    title = f"{servers()[server].title} {servers()[server].version}"
    return _row(title, str(counts["exact"]), str(counts["refused"]), str(silent))


def _shapes(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of shapes; those with equal cells and words are one row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for shape in TRIED:
        cells = tuple(_cell(found[shape.name].get(name)) for name in RUN)
        if set(cells) != {"exact"}:
            writer = "loramux's own" if shape.writer == "probe" else shape.writer
            rows.setdefault((writer, shape.what, *cells), []).append(shape.release)
    lines = [_row("written by", "shape", *(servers()[name].title for name in RUN)), _row(*["---"] * 5)]
    for (writer, what, *results), releases in rows.items():
        known = ", ".join(release for release in releases if release != "any")
        lines.append(_row(writer, f"{what}{known and f' ({known})'}", *results))
    return "".join(lines)


def _cell(outcome: Mapping[str, Any] | None) -> str:
    if outcome is None:
        return "-"
    if outcome["outcome"] == "partly":
        return f"**ignores {len(outcome['ignored'])}**"
    return WORDS.get(str(outcome["outcome"]), str(outcome["outcome"]))


def _rules() -> str:
    """Return a table of the rules whose verdict nobody sees."""
    seen: dict[tuple[str, str, str], list[str]] = {}
    for name, server in servers().items():
        for rule in rules_of(name):
            if rule.outcome in (Outcome.IGNORED, Outcome.OTHER):
                outcome = "ignores tensors" if rule.outcome is Outcome.IGNORED else "something else"
                seen.setdefault((rule.why, outcome, rule.fix), []).append(f"{server.title} ({rule.how})")
    lines = [_row("server", "verdict", "why", "cure"), _row(*["---"] * 4)]
    lines += [_row(", ".join(names), outcome, why, fix) for (why, outcome, fix), names in seen.items()]
    return "".join(lines)


def _row(*cells: str) -> str:
    return "|".join(("", *(f" {cell} " if cell != "---" else cell for cell in cells), "\n"))
