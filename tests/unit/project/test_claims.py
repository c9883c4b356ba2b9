"""Figures of documents that a constant of the code decides: the page and the code agree."""

import re

import pytest

from loramux_shared.deployment import LoraConfiguration
from tests.support.cases import cases
from tests.support.root import ROOT

MIB = 1 << 20
RANK = LoraConfiguration.model_json_schema()["properties"]["max_lora_rank"]
CLAIMS = cases(__file__, "CLAIMS")


@pytest.mark.parametrize(
    ("page", "claim"), [(page, claim) for page, claims in CLAIMS.items() for claim in claims]
)
def test_a_figure_is_that_of_the_code(page: str, claim: str) -> None:
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
