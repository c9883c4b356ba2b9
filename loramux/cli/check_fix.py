"""``loramux check --fix``: an adapter written again as every server reads it, by a process of the builder."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.cli import shell
from loramux.cli.check import CheckOptions, folders_meant, require_folders, show_finding
from loramux.cli.local.services import require_packages
from loramux_shared.deployment import Build, Dtype, Repository, SourceKind
from loramux_shared.faults import Finding, InternalFault, fault_from
from loramux_shared.process import python
from loramux_shared.untrusted_json import parse_strict_json


@dataclass(frozen=True)
class FixedAdapter:
    """The result for an adapter."""

    repository: Repository
    """The folder that was written, or the adapter as it was."""
    changes: tuple[str, ...]
    findings: tuple[Finding, ...]
    """Why it cannot be fixed."""

    @property
    def outcome(self) -> str:
        """Return ``fixed``, ``nothing`` or ``refused``."""
        return "refused" if self.findings else "fixed" if self.changes else "nothing"

    @property
    def fields(self) -> dict[str, Any]:
        """Return it for JSON; every field is always there."""
        out = self.repository.label if self.outcome == "fixed" else None
        findings = [finding.model_dump(exclude={"adapter"}) for finding in self.findings]
        return {"outcome": self.outcome, "out": out, "changes": list(self.changes), "findings": findings}

    def show(self, show: Callable[..., None]) -> None:
        """Print it."""
        match self.outcome:
            case "fixed":
                show(f"fixed: {self.repository.label} has the same A, B and scales", "bold green")
            case "nothing":
                show("nothing to fix: nothing was written", "bold green")
            case _:
                show("not fixed: nothing was written", "bold red")
        for change in self.changes:
            show(f"  {change}")
        for finding in self.findings:
            show_finding(finding, show)
        show()


def fix_adapter(options: CheckOptions, out: Path) -> FixedAdapter:
    """Write an adapter into a new folder.

    Raises:
        SettingsInvalid: it cannot be one.
        Fault: what sources raise.
    """
    require_packages("builder", "check")
    out = out.expanduser().absolute()
    lora = options.lora.model_copy(update={"dtype": Dtype.FLOAT32})
    build = Build(
        checkpoint_repository=options.base,
        lora_adapters={"adapter": options.adapter},
        lora_configuration=lora,
        signed_by=options.signed_by,
    )
    roots = [str(folder.expanduser().absolute()) for folder in options.local_roots]
    question = {"build": build.model_dump(mode="json"), "out": str(out), "local_roots": roots}
    with folders_meant(options), shell.step(f"fixing {options.adapter.label}"):
        require_folders(options.local_roots)
        answer = _ask(question)
    written = Repository(source=SourceKind.LOCAL, repo=str(out)) if answer["changes"] else options.adapter
    findings = tuple(Finding.model_validate(each) for each in answer["findings"])
    return FixedAdapter(written, tuple(answer["changes"]), findings)


def _ask(question: dict[str, Any]) -> dict[str, Any]:
    ended = subprocess.run(  # noqa: S603 - this interpreter, and a module of ours
        python("builder_service.fix"), input=json.dumps(question).encode(), capture_output=True, check=False
    )
    if ended.returncode:
        last = ended.stderr[-512:].decode(errors="replace").strip().rpartition("\n")[2]
        raise InternalFault(f"the process that fixes ended with {ended.returncode}: {last}. Please report it.")
    answer: dict[str, Any] = parse_strict_json(ended.stdout)
    if fault := answer.get("fault"):
        raise fault_from(fault)
    return answer
