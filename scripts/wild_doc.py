"""docs/reference/wild-adapters.md, from the shapes that tests try."""

from __future__ import annotations

from scripts.pages import table
from tests.golden.wild.shape import Shape
from tests.golden.wild.shapes import SHAPES

HEAD = """\
# Wild adapters

<!-- Written by scripts/wild_doc.py from tests/golden/wild: `make docs`. -->

Each row is a folder with the fields, keys and files that a program writes, made small. A test builds all of
them through the whole pipeline. *Exact* means that every module of the bundle adds what PEFT {peft} adds after
it loaded the adapter, and no other module adds anything. Where PEFT itself does not know the keys, the file
that it loaded has the same tensors under its own: *renamed*. Codes are those of [errors.md](errors.md); what
begins with `W_` is a warning. A folder with `adapter_model.bin` alone is never unpickled: where you trust it,
load it with PEFT and save it again, which writes safetensors.

{counts}
"""


def page() -> str:
    """Return the whole page."""
    exact = [shape for shape in SHAPES if not shape.refused]
    counts = (
        f"{len(SHAPES)} shapes tried: {len(exact)} exact, {len(SHAPES) - len(exact)} refused by name. "
        f"Of the exact ones PEFT loads {sum(shape.under is None for shape in exact)} as they are."
    )
    rows = [(shape.writer, shape.release, shape.what, _result(shape)) for shape in SHAPES]
    head = HEAD.format(counts=counts, peft="0.21")
    return head + "\n" + table(("writer", "version", "what is special", "result"), rows)


def _result(shape: Shape) -> str:
    codes = ", ".join(f"`{code}`" for code in dict.fromkeys(shape.codes.split()))
    if shape.refused:
        return f"refused: {codes}"
    return ", ".join(filter(None, ("exact", "renamed" if shape.under is not None else "", codes)))
