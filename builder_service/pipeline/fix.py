"""Fix: an adapter written again in the form that every server reads, and compared with what it was."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from builder_service.domain.peft_kinds.lora import LORA
from builder_service.domain.plain_lora import PlainLora, beside_lora, differences, plain_lora
from builder_service.domain.rules import adapter as peft_files
from builder_service.domain.rules.checked import CheckedAdapter, Rulebook
from builder_service.domain.rules.tensor_passes import check_tensors
from builder_service.domain.safetensors_header import READABLE
from builder_service.pipeline import npy_files
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.fetch import fetch_adapters
from builder_service.pipeline.making import open_workshop
from builder_service.pipeline.progress import Progress
from builder_service.pipeline.validate import container_of, rulebook
from loramux_shared.adapter_files import CONFIG, WEIGHTS, read_small, weight_files
from loramux_shared.bundle.npy import Array
from loramux_shared.deployment import Build, SourceKind
from loramux_shared.faults import Finding, SettingsInvalid
from loramux_shared.untrusted_json import JsonInvalid, parse_strict_json, quoted
from loramux_shared.wording import counted, listed

ALIGNMENT: Final = 8
"""Bytes: data of safetensors begin at a multiple."""
_CACHED: Final = "models--"
"""Begins the names of folders of the hub's cache."""


@dataclass(frozen=True)
class FixedAdapter:
    """The result for an adapter: written again, nothing to fix, or refused."""

    changes: tuple[str, ...] = ()
    """Differences of the folder that was written; none: nothing was."""
    findings: tuple[Finding, ...] = ()
    """Why the adapter cannot be fixed."""


def fix_one(build: Build, context: BuildContext, progress: Progress, out: Path) -> FixedAdapter:
    """Write the one adapter of a build into a new folder. Blocks.

    Raises:
        SettingsInvalid: the folder cannot be written.
        Fault: what the base or a source raises; rules that are broken are findings.
    """
    require_new(out)
    [adapter] = build.lora_adapters.values()
    for repository in (adapter, build.checkpoint_repository):
        local = repository.source is SourceKind.LOCAL
        if local and out.resolve().is_relative_to(Path(repository.repo).resolve()):
            raise SettingsInvalid(f"--fix {out}: expected a folder outside of {repository.repo}. Name another.")
    with open_workshop(context, context.store, progress) as workshop:
        base = workshop.describe(build.checkpoint_repository)
        rules = rulebook(base.model, build.lora_configuration, workshop.weights(base.record))
        [fetched] = fetch_adapters(
            build.lora_adapters, context.sources, workshop.space, workshop.work, progress, build.signed_by
        )
        if fetched.findings:
            return FixedAdapter(findings=fetched.findings)
        used = weight_files(fetched.files)
        return fix_folder(fetched.folder, used, sorted(fetched.files.keys() - set(used)), rules, out)


def fix_folder(
    folder: Path, used: tuple[str, ...], beside: list[str], rules: Rulebook, out: Path
) -> FixedAdapter:
    """Write a folder of ours, whose config may be changed, as another one; files beside are copied."""
    fields, changes = _repair(folder, used)
    before = _read(folder, rules, used)
    if isinstance(before, CheckedAdapter):
        return FixedAdapter(findings=before.errors)
    written = before.fields(fields)
    changes += _changes(before, fields, written, used)
    if not changes:
        return FixedAdapter()
    new = _folder_beside(out)
    try:
        differ = _write(new, before, written, rules)
        for name in beside:
            shutil.copyfile(folder / name, new / name)
        if not differ:
            new.rename(out)  # an empty folder may be there
    except OSError as error:
        raise SettingsInvalid(f"--fix {out}: {error.strerror}. Name another folder.") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if differ:
        found = f"{listed(differ)}: other values when it was read again"
        fix = "Please report it; the folder was not written."
        return FixedAdapter(
            findings=(Finding(code="E_NO_FIX", expected="the same A and B", found=found, fix=fix),)
        )
    return FixedAdapter(tuple(changes))


def require_new(out: Path) -> None:
    """Raise SettingsInvalid unless a folder can be made, or is empty, in a folder that is there."""
    problem, parent = "", out.parent.resolve()
    if out.is_symlink():
        problem = "a link"
    elif out.exists() and not out.is_dir():
        problem = "a file"
    elif out.exists() and any(out.iterdir()):
        problem = "a folder with files, which are never replaced"
    elif not parent.is_dir():
        problem = "a folder above it that is not there"
    elif any(part.startswith(_CACHED) for part in parent.parts) or any(parent.glob(f"{_CACHED}*")):
        problem = "a folder of the hub's cache"
    if problem:
        raise SettingsInvalid(f"--fix {out}: expected a new folder, found {problem}. Name another one.")


def _folder_beside(out: Path) -> Path:
    """Return a new folder that becomes another one when all is in it."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise SettingsInvalid(f"--fix {out}: {error.strerror}. Name another folder.") from error
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    return folder


def _read(folder: Path, rules: Rulebook, used: Sequence[str] = (CONFIG,)) -> PlainLora | CheckedAdapter:
    """Return an adapter as plain LoRA, or its check with the errors for which it is none."""
    check = (peft_files if CONFIG in used else container_of(used)).open_check(folder, rules)
    if isinstance(check, CheckedAdapter):
        return check
    checked = check_tensors(check)
    if checked.errors:
        return checked
    beside = beside_lora(check)
    return CheckedAdapter(tuple(beside)) if beside else plain_lora(check)


def _repair(folder: Path, used: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
    """Write out what a config leaves to its reader, and return its fields and the changes.

    A config without a kind is one of LoRA, and a whole number with a point is a number.
    """
    if CONFIG not in used:
        return {"task_type": "CAUSAL_LM", "base_model_name_or_path": None}, []
    try:
        fields = parse_strict_json(read_small(folder / CONFIG))
    except (JsonInvalid, OSError):
        return {}, []  # which the rules will say
    if not isinstance(fields, dict):
        return {}, []
    repaired: dict[str, Any] = {"peft_type": LORA.peft_type} | fields
    if isinstance(rank := fields.get("r"), float) and rank.is_integer():
        repaired["r"] = int(rank)
    changes = _changed_fields(fields, repaired)
    if changes:
        (folder / CONFIG).write_text(json.dumps(repaired), encoding="utf-8")
    return repaired, changes


def _changed_fields(fields: Mapping[str, Any], written: Mapping[str, Any]) -> list[str]:
    """Return the fields of a config that have another value, each with both."""
    changed = [name for name, value in written.items() if json.dumps(value) != json.dumps(fields.get(name))]
    return [f"{CONFIG}: {name} {quoted(fields.get(name))} -> {quoted(written[name])}" for name in changed]


def _changes(
    before: PlainLora, fields: Mapping[str, Any], written: Mapping[str, Any], used: Sequence[str]
) -> list[str]:
    """Return the differences between an adapter of these files and what is written."""
    config, renamed, redundant = before.check.config, before.renamed, sorted(before.check.redundant)
    of_rows = isinstance(config, npy_files.FoldedConfig)
    kind = "TensorRT-LLM's rows" if of_rows else config.initial if config.initial else config.kind.peft_type
    kind, files = kind if of_rows or CONFIG in used else "GGUF", len(used) - 2
    texts = {
        f"{kind} written out as LoRA of rank {before.rank}": kind != LORA.peft_type,
        f"{counted(files, 'file')} merged into one": files > 1 and not of_rows,
        f"{counted(len(renamed), 'tensor')} renamed, as {' -> '.join(renamed[0]) if renamed else ''}": renamed,
        f"{counted(len(before.padded), 'module')} padded with zeros to rank {before.rank}": before.padded,
        f"{counted(len(before.folded), 'scale')} multiplied into B, in float32": before.folded,
        f"{counted(len(redundant), 'tensor')} left out, which change nothing: {listed(redundant)}": redundant,
    }
    return [
        *(text for text, holds in texts.items() if holds),
        *(_changed_fields(fields, written) if kind == LORA.peft_type else ()),
    ]


def _write(folder: Path, plain: PlainLora, fields: Mapping[str, Any], rules: Rulebook) -> list[str]:
    """Write an adapter, read it again by the same rules, and return the modules that differ."""
    (folder / CONFIG).write_text(json.dumps(fields, indent=2), encoding="utf-8")
    write_safetensors(folder / WEIGHTS, plain.shapes(), plain.tensors())
    after = _read(folder, rules)
    return (
        [str(each) for each in after.errors] if isinstance(after, CheckedAdapter) else differences(plain, after)
    )


_TYPES: Final = {kind: name for name, kind in READABLE.items()}
_WIDEST: Final = "BF16"
"""The longest name of a type."""


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, Array]]
) -> None:
    """Write tensors of these shapes, one at a time; blanks fill the place that their header was given."""
    with path.open("wb") as file:
        most = 4 * sum(map(math.prod, shapes.values()))
        entry = {"dtype": _WIDEST, "data_offsets": [most, most]}
        room = len(_header({name: entry | {"shape": shape} for name, shape in shapes.items()}))
        file.seek(8 + (room := -(-room // ALIGNMENT) * ALIGNMENT))
        entries, begin = {}, 0
        for name, values in tensors:
            end = begin + file.write(np.ascontiguousarray(values).tobytes())
            entries[name] = {"dtype": _TYPES[values.dtype], "shape": values.shape, "data_offsets": [begin, end]}
            begin = end
        file.seek(0)
        file.write(room.to_bytes(8, "little") + _header(entries).ljust(room))
        file.flush()
        os.fsync(file.fileno())


def _header(entries: Mapping[str, Any]) -> bytes:
    return json.dumps({"__metadata__": {"format": "pt"}} | dict(entries)).encode()
