"""docs/reference/errors.md, from the codes."""

from __future__ import annotations

from collections import defaultdict
from typing import TypeAlias

from loramux_shared.codes import CODES, CURES, Subject
from loramux_shared.faults import FAULTS
from scripts.pages import one_line

Entry: TypeAlias = tuple[str, str, str]

HEAD = """\
# Errors: reasons and codes

<!-- Written by scripts/errors_doc.py from codes.py and faults.py of shared/loramux_shared: `make docs`. -->

What each failure means and what to do. A failed call has a gRPC status, a `google.rpc.ErrorInfo` with the
domain `loramux` and one of the reasons below and, where they apply, a `google.rpc.BadRequest` with one
violation per finding, a `google.rpc.RetryInfo`, and in the ErrorInfo's metadata the `repository` that was
being read. A failed build has the same in `Deployment.failure`.

A finding has a code, the adapter, the place, what was expected, what was found and what to do; there is one
per code and cause. Codes with `E_` refuse an adapter, and with it the build; `W_` are warnings. *Merge it*
means: `merge_and_unload` the adapter into its base, and serve a full model.
"""


def page() -> str:
    """Return the whole page."""
    by_status: defaultdict[str, list[Entry]] = defaultdict(list)
    for reason, kind in FAULTS.items():
        means = one_line((kind.__doc__ or "").split("\n\n")[0]).removesuffix(".")
        by_status[kind.status.name].append((reason, means, CURES[reason]))
    parts = [HEAD, "## Reasons, by status\n"]
    parts += [f"### {status}\n\n{_list(entries)}" for status, entries in sorted(by_status.items())]
    for subject in Subject:
        entries = [(each.code, each.meaning, each.cure) for each in CODES.values() if each.subject is subject]
        parts.append(f"## Findings about {subject}\n\n{_list(entries)}")
    return "\n".join(parts)


def _list(entries: list[Entry]) -> str:
    """Return a line per entry: name, meaning and cure."""
    return "".join(f"- `{name}`: {means}. {_sentence(cure)}\n" for name, means, cure in entries)


def _sentence(cure: str) -> str:
    cure = cure.replace("Merge it into the base (`merge_and_unload`) and serve a full model", "Merge it")
    cure = cure.replace("merge it into the base and serve a full model", "merge it")
    return f"{cure[0].upper()}{cure[1:].removesuffix('.')}."
