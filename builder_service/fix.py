"""``python -m builder_service.fix``: the process that ``loramux check --fix`` starts for one adapter.

The question is JSON on stdin: what would be built, the folder to write, and folders that may be read. The
answer is JSON on stdout: the changes, the findings, or a fault.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder_service.pipeline.check import PREFIX
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.fix import fix_one
from builder_service.pipeline.progress import Progress
from loramux_shared.deployment import Build
from loramux_shared.faults import Fault, fault_to
from loramux_shared.process import log_to_stderr
from loramux_shared.settings import BuilderSettings, load_settings
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from loramux_shared.untrusted_json import parse_strict_json


def main() -> None:
    """Fix an adapter."""
    log_to_stderr()
    question = parse_strict_json(sys.stdin.buffer.read())
    try:
        answer = fix(question)
    except Fault as fault:
        answer = {"fault": fault_to(fault.with_message(fault.message.removeprefix(PREFIX)))}
    sys.stdout.write(json.dumps(answer))


def fix(question: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes of an adapter that was written again, and the findings of one that is refused."""
    settings = load_settings(BuilderSettings, local_roots=tuple(question["local_roots"]))
    sources = open_sources(
        local_roots=settings.local_roots,
        allowed_hosts=settings.allowed_hosts,
        secrets_dir=settings.secrets_dir,
        work_dir=settings.work_dir,
    )
    context = BuildContext(MemoryStore(), sources, settings.work_dir)
    build = Build.model_validate(question["build"])
    fixed = fix_one(build, context, Progress(build.lora_adapters), Path(question["out"]))
    findings = [finding.model_dump(exclude={"adapter"}) for finding in fixed.findings]
    return {"changes": fixed.changes, "findings": findings}


if __name__ == "__main__":
    main()
