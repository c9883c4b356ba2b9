"""Prove: what the adapters of a build should answer, computed in a process of its own where torch is.

The builder itself never imports torch. The reference reads the adapters' own files, not what was converted.
"""

import importlib.util
import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from builder_service.pipeline.making import Prover
from builder_service.pipeline.progress import Progress, Stage
from builder_service.pipeline.validate import ValidAdapter
from loramux_shared.bases.files import GGUF_SUFFIX
from loramux_shared.bundle.generation import BaseRecord
from loramux_shared.bundle.modules import NO_LAYER
from loramux_shared.bundle.proof import Effect, Proof
from loramux_shared.deployment import Build
from loramux_shared.faults import FAULTS, AdapterInvalid, InternalFault, ResourcesExhausted, SettingsInvalid
from loramux_shared.process import python
from loramux_shared.sources.base import Room, unwatched
from loramux_shared.sources.checkpoint import fetch_base
from loramux_shared.sources.open import Sources

NEEDS: Final = ("torch", "inference_service")
MODULE: Final = "loramux_prove"
LIMIT_S: Final = 3600.0
"""A base of 70e9 parameters is read and computed in about half of it on a machine of 32 cores."""
POLL_S: Final = 0.05
LAST_LINES: Final = 3


def require() -> None:
    """Raise `SettingsInvalid` unless the reference can run here."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsInvalid(
            f"prove needs {' and '.join(missing)} beside the builder: pip install 'loramux[inference]' there, "
            "or build without prove."
        )


def prove_adapters(
    adapters: Sequence[ValidAdapter],
    settings: Build,
    base: BaseRecord,
    sources: Sources,
    work: Path,
    progress: Progress,
    room: Room = unwatched,
) -> list[Proof]:
    """Return the proofs of adapters, in their order.

    Raises:
        AdapterInvalid: under an adapter the model computes no numbers.
        CheckpointInvalid: the base cannot be served.
        BuildInterrupted: the build was asked to end.
        InternalFault: the reference failed, or disagrees about which rows there are.
    """
    if not adapters:
        return []
    for adapter in adapters:
        why = "has another vocabulary than the base" if adapter.checked.vocab is not None else ""
        why = why or ("classifies texts" if adapter.checked.score is not None else "")
        if any(name.endswith(GGUF_SUFFIX) for name in adapter.fetched.files):
            why = "is a file of GGUF"
        if why:
            raise AdapterInvalid(
                f"adapter {adapter.fetched.name!r} {why}, and such an adapter cannot be proved. Build "
                "without prove, or without this adapter."
            )
    for adapter in adapters:
        progress.enter(adapter.fetched.name, Stage.PROVING)
    folder = fetch_base(base, work / "base", sources, lambda _: progress.check(), room)
    truncate_to = settings.lora_configuration.truncate_to_rank
    request = {
        "base": str(folder),
        "max_seq_len": settings.max_seq_len,
        "adapters": {
            adapter.fetched.name: {"folder": str(adapter.fetched.folder), "truncate_to": truncate_to}
            for adapter in adapters
        },
    }
    answer = _run(request, progress)
    if fault := answer.get("fault"):
        raise FAULTS.get(fault["reason"], InternalFault)(f"prove: {fault['message']}")
    return [_proof(adapter, answer["proofs"][adapter.fetched.name]) for adapter in adapters]


def _run(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as stdin:
        stdin.write(json.dumps(request).encode())
        stdin.seek(0)
        process = subprocess.Popen(  # noqa: S603 - this interpreter, and a module of ours
            python(MODULE), stdin=stdin, stdout=out, stderr=errors
        )
        try:
            _wait(process, progress)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            lines = errors.read()[-4096:].decode(errors="replace").strip().splitlines()
            last = " / ".join(lines[-LAST_LINES:])
            if process.returncode < 0:
                raise ResourcesExhausted(
                    f"prove: the reference was killed by signal {-process.returncode}: {last}"
                )
            raise InternalFault(f"prove: the reference failed: {last}. Please report it.")
        answer: dict[str, Any] = json.load(out)  # noqa: TID251 - a process of ours answers
        return answer


def _wait(process: subprocess.Popen[bytes], progress: Progress) -> None:
    begin = time.monotonic()
    while process.poll() is None:
        progress.check()
        if time.monotonic() - begin > LIMIT_S:
            raise ResourcesExhausted(f"prove: the reference needs more than {LIMIT_S:g} s here")
        time.sleep(POLL_S)


def _proof(adapter: ValidAdapter, answer: dict[str, Any]) -> Proof:
    name = adapter.fetched.name
    effects = {(layer, module): effect for layer, module, effect in answer["effects"]}
    rows = [(planned.row.layer, planned.row.module) for planned in adapter.checked.rows]
    rows += [(NO_LAYER, planned.replaced.module) for planned in adapter.checked.replaced]
    if not effects and any(finding.code == "W_ZERO_B" for finding in adapter.checked.findings):
        effects = dict.fromkeys(rows, Effect(norm=0.0, dots=(0.0,) * 8))  # of the row that says so
    if effects.keys() != set(rows):
        raise InternalFault(
            f"adapter {name!r}: builder and reference disagree about its rows. Please report it."
        )
    try:
        return Proof.model_validate({"probes": answer["probes"], "effects": [effects[row] for row in rows]})
    except ValidationError as error:
        raise AdapterInvalid(
            f"adapter {name!r}: with it, the model computes {error.error_count()} values that are not finite, "
            "so it cannot be proved."
        ) from error


PROVER: Final = Prover(require, prove_adapters)
