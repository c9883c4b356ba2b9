"""The results of `loramux check --fix` for every shape, and the verdicts of servers about them.

::

    python -m tests.golden.servers.fixes

writes ``fixes.json``, which `tests/golden/test_fixes.py` compares with what happens.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import save_file

from builder_service.pipeline.fix import FixedAdapter, fix_one
from builder_service.pipeline.progress import Progress
from loramux.servers.facts import read_facts
from loramux.servers.verdicts import Outcome, judge, servers
from tests.golden.servers.probes import TRIED
from tests.golden.wild.bases import BASES
from tests.golden.wild.shape import CONFIG, NAME, Shape
from tests.support.adapters import HIDDEN, VOCAB
from tests.support.folders import context_of, deployment_of, local_source

FIXES: Final = Path(__file__).with_name("fixes.json")
MAX_RANK: Final = 64
OTHERS: Final = tuple(name for name in servers() if name != "loramux")


@dataclass(frozen=True)
class Fix:
    """The result for a shape."""

    fixed: FixedAdapter
    out: Path
    left: dict[str, str]
    """Servers that do not serve the result exactly, with their verdicts."""

    @property
    def row(self) -> str:
        """Return the result as the table has it: the codes of a refusal, or the changes and what is left."""
        if self.fixed.findings:
            return " ".join(dict.fromkeys(finding.code for finding in self.fixed.findings))
        changes = [_short(change) for change in self.fixed.changes] or ["nothing"]
        return " | ".join([*changes, *(f"{name} {verdict}" for name, verdict in self.left.items())])


def _short(change: str) -> str:
    """Return a change without the names of tensors and the values of fields."""
    field = change.removeprefix(f"{CONFIG}: ").partition(" ")[0]
    return field if change.startswith(CONFIG) else change.partition(", ")[0]


def fix(shape: Shape, folder: Path) -> Fix:
    """Fix a shape."""
    base, out = folder / NAME, folder / "out"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(BASES[shape.base]))
    save_file({"model.embed_tokens.weight": np.zeros((VOCAB, HIDDEN), "f4")}, base / "model.safetensors")
    adapter = shape.write(folder / "one")
    lora = {"dtype": "float32", "max_lora_rank": MAX_RANK}
    build = deployment_of(
        folder, "one", checkpoint_repository=local_source(base), lora_configuration=lora
    ).build
    fixed = fix_one(build, context_of(folder), Progress(build.lora_adapters), out)
    facts = read_facts(out if fixed.changes else adapter, MAX_RANK, base)
    verdicts = {} if fixed.findings else {name: judge(name, facts).outcome for name in OTHERS}
    left = {name: str(outcome) for name, outcome in verdicts.items() if outcome is not Outcome.EXACT}
    return Fix(fixed, out, left)


def main() -> None:
    """Write the table."""
    rows = {}
    for shape in TRIED:
        with tempfile.TemporaryDirectory() as folder:
            rows[shape.name] = fix(shape, Path(folder)).row
    FIXES.write_text(f"{json.dumps(rows, indent=1)}\n")


if __name__ == "__main__":
    main()
