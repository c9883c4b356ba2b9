"""docs/reference/wild-adapters.md, from the shapes that tests try."""

from __future__ import annotations

from collections.abc import Sequence

from tests.golden.wild.shape import Shape
from tests.golden.wild.shapes import SHAPES

MANY = 9
HEAD = """\
# Wild adapters

<!-- Written by scripts/wild_doc.py from tests/golden/wild: `make docs`. -->

Find the program that wrote your adapter, and what becomes of it. Each shape is a small folder with the
fields, keys and files of that program, and a test builds all of them. *Exact* means that every module of the
bundle adds what PEFT {peft} adds, and no other module adds anything; *renamed* that PEFT itself does not know
the keys, and the comparison gave it the same tensors under its own. [Errors](errors.md) explains the codes;
`W_` is a warning.

{counts}
"""
EXACT = """\
## Exact

What PEFT 0.2 to 0.21 saves of each [kind](adapters.md#kinds) is exact, and so are plain adapters of {others}.
The shapes below have a warning, or keys that PEFT itself does not know.
"""


def page() -> str:
    """Return the whole page."""
    exact = [shape for shape in SHAPES if not shape.refused]
    remarkable = [shape for shape in exact if _result(shape)]
    others = sorted({shape.writer for shape in exact if not _result(shape)} - {"PEFT"})
    counts = (
        f"{len(SHAPES)} shapes tried: {len(exact)} exact, {len(SHAPES) - len(exact)} refused by name. "
        f"Of the exact ones PEFT loads {sum(shape.under is None for shape in exact)} as they are."
    )
    head = HEAD.format(counts=counts, peft="0.21")
    return "\n".join(
        (
            head,
            EXACT.format(others=", ".join(others)),
            _list(remarkable),
            "## Refused\n",
            _list([each for each in SHAPES if each.refused]),
        )
    )


def _list(shapes: Sequence[Shape]) -> str:
    """Return a line per writer: each shape with releases and result, those of several releases once."""
    releases: dict[tuple[str, str, str], list[str]] = {}
    for shape in shapes:
        what = "the fields of these releases" if shape.what.startswith("fields of ") else shape.what
        releases.setdefault((shape.writer, what, _result(shape)), []).append(shape.release)
    writers: dict[str, list[str]] = {}
    for (writer, what, result), names in releases.items():
        known = ", ".join(filter(None, (*(name for name in names if name != "any"), result)))
        writers.setdefault(writer, []).append(f"{what}{known and f' ({known})'}")
    return "".join(f"- **{writer}**: {_joined(shapes)}\n" for writer, shapes in writers.items())


def _joined(shapes: Sequence[str]) -> str:
    """Return a few shapes in one line, and many as a list."""
    return "; ".join(shapes) if len(shapes) < MANY else "\n" + "\n".join(f"    - {shape}" for shape in shapes)


def _result(shape: Shape) -> str:
    codes = ", ".join(f"`{code}`" for code in dict.fromkeys(shape.codes.split()))
    renamed = "*renamed*" if not shape.refused and shape.under is not None else ""
    return ", ".join(filter(None, (renamed, codes)))
