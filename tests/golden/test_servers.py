"""The rules about other servers against what these did: `tests/golden/servers/outcomes.json`."""

import json
from pathlib import Path
from typing import Any, Final

import pytest

from loramux.servers.facts import Facts, read_facts
from loramux.servers.verdicts import Outcome, judge, rules_of, servers
from tests.golden.servers.probes import TRIED, WIDE_BASES
from tests.golden.servers.reference import PICKLED, drawn, write
from tests.golden.wild.shape import Shape

MAX_RANK: Final = 64
_FILE: Final[dict[str, Any]] = json.loads((Path(__file__).parent / "servers" / "outcomes.json").read_text())
FOUND: Final[dict[str, dict[str, dict[str, Any]]]] = _FILE["outcomes"]
MEANS: Final = {"nothing": Outcome.IGNORED, "partly": Outcome.IGNORED}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Facts]:
    """Every shape as the servers saw it."""
    found = {}
    with pytest.MonkeyPatch.context() as environment:
        for name in ("CC", "CXX"):  # PEFT sets them for BOFT
            environment.setenv(name, "gcc")
        for shape in TRIED:
            folder = tmp_path_factory.mktemp("shape")
            (folder / "config.json").write_text(json.dumps(WIDE_BASES[shape.base]))
            found[shape.name] = read_facts(write(drawn(shape), folder / "adapter"), MAX_RANK, folder)
    return found


@pytest.mark.parametrize("shape", TRIED, ids=lambda shape: shape.name.replace(" ", "-"))
def test_every_prediction_is_what_the_server_did(shape: Shape, facts: dict[str, Facts]) -> None:
    """For a server that was run, the rules say of each shape what it did with it."""
    for server, found in FOUND[shape.name].items():
        verdict = judge(server, facts[shape.name])
        if PICKLED in shape.files and shape.tensors is None:  # pickles are not opened
            assert verdict.outcome is Outcome.UNKNOWN
            continue
        assert verdict.outcome == MEANS.get(found["outcome"], found["outcome"]), (server, verdict, found)
        if verdict.outcome is Outcome.IGNORED:
            ignored = verdict.tensors if found["outcome"] == "nothing" else len(found["ignored"])
            assert len(verdict.keys) == ignored, (server, verdict, found)


def test_rules_are_about_the_versions_that_were_run() -> None:
    """The version of a server that was run is that of the file, without the name of its build."""
    for server, version in _FILE["versions"].items():
        assert servers()[server].version == version.partition("+")[0]


@pytest.mark.parametrize("server", [name for name, each in servers().items() if each.how == "run"])
def test_a_rule_that_was_run_decides_about_a_shape(server: str, facts: dict[str, Facts]) -> None:
    """Rules that no shape shows are marked as read."""
    tried = [each for name, each in facts.items() if server in FOUND[name]]
    decided = {(verdict.why, verdict.source) for each in tried if (verdict := judge(server, each))}
    claimed = {(rule.why, rule.source) for rule in rules_of(server) if rule.how == "run"}
    assert claimed <= decided
