"""Write docs/errors.md from the catalogue; with --check, say whether that changes anything."""

from __future__ import annotations

import sys
from pathlib import Path

from shared.catalogue import CODES, CURES, Subject
from shared.faults import FAULTS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "errors.md"
HEAD = """\
# Reasons and codes

<!-- Written by scripts/errors_doc.py from shared/catalogue.py and shared/faults.py: `make errors`. -->

A failed call has a canonical gRPC status, a `google.rpc.ErrorInfo` with domain `loramux` and one of the
reasons below, and, where they apply, a `google.rpc.BadRequest` with one violation per finding and a
`google.rpc.RetryInfo`. A failed build carries the same reason and findings in `Deployment.failure`.

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
    parts = [HEAD, "## Reasons\n", _table(("reason", "status", "what it means", "what to do"), reasons)]
    for subject in Subject:
        entries = [
            (entry.code, entry.meaning, entry.cure) for entry in CODES.values() if entry.subject is subject
        ]
        parts += [f"## Findings about {subject}\n", _table(("code", "what it means", "what to do"), entries)]
    return "\n".join(parts)


def _first_sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split()).removesuffix(".")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return (
        "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        + "\n"
    )


def main() -> None:
    """Write, or compare."""
    if "--check" not in sys.argv:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        raise SystemExit("docs/errors.md is out of date. Run `make errors`.")


if __name__ == "__main__":
    main()
