"""A report as one HTML file that loads nothing, runs our own script alone, and shows answers as text."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from loramux_arena.contest import Found
from loramux_arena.plan import Plan
from loramux_arena.questions import Question
from loramux_arena.standings import Standings

FOLDER: Final = Path(__file__).parent / "page"
_ESCAPES: Final = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


def page(plan: Plan, questions: Sequence[Question], found: Found, report: Standings, when: datetime) -> str:
    """Return the file.

    Its data is JSON in a script element that nobody runs, without a character that could end the element; its
    script writes all of it as text. The page's policy allows this style and this script by their hashes, and no
    connections.
    """
    parts = {name: (FOLDER / f"arena.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    policy = (
        f"default-src 'none'; style-src {_hash(parts['css'])}; script-src {_hash(parts['js'])}; "
        "base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(_data(plan, questions, found, report, when), separators=(",", ":"), ensure_ascii=True)
    content = {"POLICY": policy, "STYLE": parts["css"], "SCRIPT": parts["js"], "DATA": data.translate(_ESCAPES)}
    before, *rest = parts["html"].split("@@")
    return before + "".join(content.get(part, part) for part in rest)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data(
    plan: Plan, questions: Sequence[Question], found: Found, report: Standings, when: datetime
) -> Mapping[str, Any]:
    answers: dict[str, dict[str, list[Any]]] = {model: {} for model in plan.models}
    for model in plan.models:
        for question in questions:
            samples = [found.answers.get((model, question.id, sample)) for sample in range(plan.samples)]
            if any(samples):
                answers[model][question.id] = [
                    None if each is None else [each.text, each.cut, each.tokens] for each in samples
                ]
    return {
        "when": when.isoformat(timespec="minutes"),
        "plan": asdict(plan),
        "report": asdict(report),
        "questions": [
            {
                "id": question.id,
                "asked": question.as_text,
                "reference": question.reference,
                "rubric": question.rubric,
                "tags": question.tags,
            }
            for question in questions
        ],
        "answers": answers,
    }
