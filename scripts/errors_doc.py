"""docs/reference/errors.md, from the codes."""

from __future__ import annotations

from loramux_shared.codes import CODES, CURES, Subject
from loramux_shared.faults import FAULTS
from scripts.pages import table

HEAD = """\
# Errors: reasons and codes

<!-- Written by scripts/errors_doc.py from codes.py and faults.py of shared/loramux_shared: `make docs`. -->

A failed call has a canonical gRPC status, a `google.rpc.ErrorInfo` with domain `loramux` and one of the
reasons below, and, where they apply, a `google.rpc.BadRequest` with one violation per finding and a
`google.rpc.RetryInfo`. The ErrorInfo's metadata hold as `repository` the one that was being read when it
happened, where one was. A failed build carries the same reason and findings in `Deployment.failure`.

A finding has a code, the adapter, the place, what was expected, what was found and what to do. There is one
per code and cause, not one per layer. Codes that begin with `E_` refuse an adapter, and with it the build.
Codes that begin with `W_` are kept as warnings: in the bundle's manifest where they follow from its bytes, and
the serving side repeats those. Where the sources of several adapters fail, there is one finding per adapter,
whose code is that adapter's reason.
"""


def page() -> str:
    """Return the whole page."""
    reasons = [
        (reason, kind.status.name, _first_sentence(kind.__doc__ or ""), CURES[reason])
        for reason, kind in FAULTS.items()
    ]
    parts = [HEAD, "## Reasons\n", table(("reason", "status", "what it means", "what to do"), reasons)]
    for subject in Subject:
        entries = [
            (entry.code, entry.meaning, entry.cure) for entry in CODES.values() if entry.subject is subject
        ]
        parts += [f"## Findings about {subject}\n", table(("code", "what it means", "what to do"), entries)]
    return "\n".join(parts)


def _first_sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split()).removesuffix(".")
