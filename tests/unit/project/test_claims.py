"""Figures of documents that a constant of the code decides: the page and the code agree."""

from __future__ import annotations

import re

import pytest

from builder_service.domain.own_rows import MAX_RUNS
from builder_service.domain.tokens import MAX_ADDED, MAX_CHARS
from builder_service.pipeline.push import MAX_FILES
from inference_service.adapters.catalog import EARLIER
from inference_service.adapters.names import LEAST_DIGITS, MOST_SCALE
from inference_service.chat.formats.lark import MOST_CALLS
from inference_service.core.adapter import MOST_PARTS
from inference_service.http.openai.schema import MAX_CHOICES, MAX_PROMPTS
from inference_service.http.wire.protocol import MAX_FIELDS as MAX_HEADERS, MAX_HEAD_BYTES, MAX_PIPELINED
from inference_service.serving.pooling import MAX_INPUTS
from loramux_shared.deployment import LoraConfiguration
from loramux_shared.rpc import options
from loramux_shared.rpc.wire import MAX_FIELDS
from tests.support.root import ROOT

MIB = 1 << 20
RANK = LoraConfiguration.model_json_schema()["properties"]["max_lora_rank"]
CLAIMS = {
    "README.md": (f"at most `max_lora_rank` ({RANK['default']})",),
    "docs/limits.md": (
        f"{MOST_PARTS} adapters in a blend, {MAX_PROMPTS} prompts and {MAX_CHOICES:,} answers a request",
        f"rank {RANK['maximum']:,} ({RANK['default']} unless",
        f"{MAX_ADDED:,} added tokens an adapter",
        f"the last {EARLIER} by digest",
    ),
    "docs/reference/adapters.md": (
        f"more than {MAX_RUNS:,} separate runs",
        f"At most {MAX_ADDED:,} of {MAX_CHARS} characters",
        f"Weights are from -{MOST_SCALE:g} to {MOST_SCALE:g}",
    ),
    "docs/reference/openai.md": (
        f"one of the last {EARLIER}, by at least {LEAST_DIGITS} first digits",
        f"up to {MAX_PROMPTS} prompts and {MAX_CHOICES:,} answers",
        f"up to {MOST_CALLS} calls",
        f"a body above {options.MAX_REQUEST_BYTES // MIB} MiB",
        f"`head_too_large`: {MAX_HEAD_BYTES // 1024} KiB or {MAX_HEADERS} fields",
    ),
    "docs/guides/access.md": (
        f"{options.MAX_REQUEST_BYTES // MIB} MiB unpacked; {MAX_FIELDS:,} fields",
        f"| an answer | {options.MAX_MESSAGE_BYTES // MIB} MiB |",
        f"pinged after {options.PING_S} s, closed {options.PING_TIMEOUT_S} s later",
    ),
    "docs/guides/embeddings.md": (f"up to {MAX_INPUTS:,}, each",),
    "docs/guides/operations.md": (
        f"| gRPC: request message | 60 s; {options.MAX_REQUEST_BYTES // MIB} MiB |",
        f"| gRPC: calls of a connection | {options.MAX_STREAMS:,}",
        f"| gRPC: calls of a method that wait | {options.MAX_WAITING:,} |",
        f"| gRPC: without calls | {options.IDLE_S} s |",
        f"| HTTP: pipelined requests | {MAX_PIPELINED} |",
        f"{MAX_HEAD_BYTES // 1024} KiB, {MAX_HEADERS} fields",
    ),
    "docs/guides/updates.md": (f"at most {MAX_FILES:,} files",),
}


@pytest.mark.parametrize(
    ("page", "claim"), [(page, claim) for page, claims in CLAIMS.items() for claim in claims]
)
def test_a_figure_is_that_of_the_code(page: str, claim: str) -> None:
    """The page has the sentence with the value of the constant."""
    text = " ".join((ROOT / page).read_text().split())
    assert claim in text, f"{page} says otherwise than: {claim}"


def test_figures_of_the_readme_are_those_of_performance() -> None:
    """Each number that the README gives as a reason stands in the table of the command beside it."""
    reasons = " ".join(
        (ROOT / "README.md").read_text().partition("## Why")[2].partition("Machines and")[0].split()
    )
    rows = {
        row.split("|")[1].strip(" `"): row
        for row in (ROOT / "docs/performance.md").read_text().splitlines()
        if "|" in row
    }
    for column, load in ((2, 1), (3, 8), (4, 32)):
        ours, peft = (
            rows[name].split("|")[column].partition(";")[0].strip()
            for name in ("loramux, adapters", "transformers + PEFT, adapters")
        )
        assert re.search(rf"{ours} (tokens a second )?for {peft} at (concurrency )?{load}\b", reasons), load
    assert f"after {int(re.findall(r'[0-9]+ ms', rows['push'])[0][:-3]) / 1000:.2f} s" in reasons
    assert f"{re.findall(r'[0-9.]+(?= x)', rows['registered'])[0]} times the step" in reasons
