"""Verdicts as documents for other programs: JSON, SARIF and JUnit."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final
from xml.etree import ElementTree

from loramux.servers.verdicts import Outcome, Verdict
from loramux_shared.wording import listed

_LEVELS: Final = {Outcome.UNKNOWN: "note"}
_SARIF: Final = "https://json.schemastore.org/sarif-2.1.0.json"
MAX_NAMED: Final = 5
"""Most tensors that a message names."""


def verdict_fields(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict for JSON; every field is always there."""
    return {
        "server": verdict.server.name,
        "version": verdict.server.version,
        "outcome": verdict.outcome.value,
        "verdict": verdict.text,
        "why": verdict.why,
        "fix": verdict.fix,
        "source": verdict.source,
        "known_by": verdict.how,
        "tensors": verdict.tensors,
        "concerned": list(verdict.keys),
    }


def message(verdict: Verdict) -> str:
    """Return a verdict as a sentence, with its cure."""
    named = listed(verdict.keys, MAX_NAMED, none="")
    parts = (f"{verdict.server.title} {verdict.server.version} {verdict.text}", verdict.why, named, verdict.fix)
    return ": ".join(part for part in parts if part)


def sarif(adapter: str, verdicts: Sequence[Verdict], version: str) -> str:
    """Return SARIF 2.1.0: a result for each server that does not serve the adapter exactly."""
    notable = [verdict for verdict in verdicts if verdict.outcome is not Outcome.EXACT]
    place = {"physicalLocation": {"artifactLocation": {"uri": f"{adapter}/adapter_config.json"}}}
    results = [
        {
            "ruleId": _rule_id(verdict),
            "level": _LEVELS.get(verdict.outcome, "error"),
            "message": {"text": message(verdict)},
            "locations": [place],
        }
        for verdict in notable
    ]
    driver = {"name": "loramux", "version": version, "rules": [_rule(verdict) for verdict in notable]}
    document = {
        "$schema": _SARIF,
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }
    return json.dumps(document, indent=2)


def _rule_id(verdict: Verdict) -> str:
    return f"{verdict.server.name}/{verdict.outcome}"


def _rule(verdict: Verdict) -> Mapping[str, Any]:
    return {"id": _rule_id(verdict), "shortDescription": {"text": f"{verdict.server.title} {verdict.text}"}}


def junit(adapter: str, verdicts: Sequence[Verdict]) -> str:
    """Return JUnit's XML: a case per server, a failure where the adapter is not served exactly."""
    failed = [each for each in verdicts if each.outcome not in (Outcome.EXACT, Outcome.UNKNOWN)]
    skipped = [each for each in verdicts if each.outcome is Outcome.UNKNOWN]
    counts = {"tests": str(len(verdicts)), "failures": str(len(failed)), "skipped": str(len(skipped))}
    suite = ElementTree.Element("testsuite", {"name": "loramux check", **counts})
    for verdict in verdicts:
        case = ElementTree.SubElement(suite, "testcase", {"classname": adapter, "name": verdict.server.name})
        if verdict in failed:
            failure = ElementTree.SubElement(
                case, "failure", {"message": verdict.text, "type": verdict.outcome.value}
            )
            failure.text = message(verdict)
        elif verdict in skipped:
            ElementTree.SubElement(case, "skipped", {"message": message(verdict)})
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)
