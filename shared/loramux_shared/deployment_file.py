"""The deployment file, from YAML to the model.

The file that users of hosted engine builders have is accepted as it is: the ``trt_llm:`` wrapper is
optional, and keys that such files carry and that mean nothing here are reported as ignored. Any other
unknown key is a `DeploymentInvalid` that names the key and the nearest known one.
"""

import re
import reprlib
from collections.abc import Hashable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from loramux_shared.adapter_files import read_small
from loramux_shared.bundle.names import NAME_RULE, ModelNames
from loramux_shared.deployment import (
    Deployment,
    LoraConfiguration,
    Merge,
    Model,
    NamesInvalid,
    Repository,
    SourceKind,
)
from loramux_shared.faults import DeploymentInvalid, Finding
from loramux_shared.signatures import read_signer
from loramux_shared.wording import MAX_FINDINGS, counted, expected_of, nearest


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keys of hosted engine builders that have no meaning here, by the block they stand in.
IGNORED_KEYS: dict[str, frozenset[str]] = {
    "": _words("""
        apply_library_patches base_image build_commands cache_internal data_dir description docker_server
        environment_variables examples_filename external_data external_package_dirs input_type live_reload
        model_cache model_class_filename model_class_name model_framework model_metadata model_module_dir
        model_type packages_dir python_version requirements requirements_file resources runtime secrets
        spec_version system_packages training_checkpoints use_local_chain_src weights
    """),
    "trt_llm": _words("inference_stack root version version_overrides"),
    "build": _words("""
        gather_all_token_logits kv_cache_type max_batch_size max_beam_width max_num_tokens
        max_prompt_embedding_table_size num_builder_gpus paged_kv_cache pipeline_parallel_count
        plugin_configuration quantization_config quantization_type skip_build_result speculator
        strongly_typed use_fused_mlp
    """),
    "runtime": _words("""
        batch_scheduler_policy config_kwargs enable_chunked_context enable_chunked_prefill
        kv_cache_free_gpu_mem_fraction kv_cache_host_memory_bytes max_batch_size max_num_tokens patch_kwargs
        tensor_parallel_size total_token_limit webserver_default_route
    """),
}
UNSERVED_KEYS: dict[str, tuple[Any, str]] = {
    "build.max_beam_width": (1, "Answers are sampled: ask for several with n."),
    "build.max_prompt_embedding_table_size": (0, "Prompt tuning is not served: train a LoRA adapter."),
    "build.pipeline_parallel_count": (1, "Set build.tensor_parallel_count instead."),
    "build.quantization_type": ("no_quant", "Set runtime.quantization; LORAMUX_KV_CACHE_DTYPE for kv."),
    "build.speculator": (None, "Set runtime.speculator, or runtime.speculative_tokens for prompt lookup."),
    "runtime.config_kwargs": ({}, "Name what it sets by the keys of this file."),
    "runtime.kv_cache_host_memory_bytes": (0, "The cache is in the device's memory alone."),
    "runtime.patch_kwargs": ({}, "Name what it sets by the keys of this file."),
    "runtime.tensor_parallel_size": (1, "Set build.tensor_parallel_count."),
}
"""Ignored keys that ask for an unsupported feature unless they have this value; and what to do instead."""


class DeploymentFile(Model):
    """A parsed file, and the keys in it that mean nothing here."""

    deployment: Deployment
    ignored: tuple[str, ...] = ()
    warnings: tuple[Finding, ...] = ()
    """Keys that ask for what is not done."""


def load_deployment(path: Path) -> DeploymentFile:
    """Read a deployment file; LOCAL repositories are resolved against its folder, ``~`` included. Raise
    DeploymentInvalid, with all violations, for a file that cannot be read, is no YAML, or breaks a rule.
    """
    from loramux_shared.deployment_yaml import parse_yaml  # clients, which read no file, import no YAML

    try:
        text = read_small(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DeploymentInvalid(f"cannot read the deployment file {path}: {reason}") from error
    file = parse_deployment(parse_yaml(text, path), default_name=_name_of(path))
    return file.model_copy(update={"deployment": _resolve_local(file.deployment, path.resolve().parent)})


def parse_deployment(data: Any, *, default_name: str = "") -> DeploymentFile:
    """Turn parsed YAML into a deployment; raise DeploymentInvalid with a finding per wrong or missing key."""
    if not isinstance(data, dict):
        found = "nothing" if data is None else type(data).__name__
        raise DeploymentInvalid(f"a deployment file is a mapping with model_name and build; found {found}")
    data, dropped = _unwrap(data)
    if default_name and data.get("model_name") is None:
        data["model_name"] = default_name
    try:
        deployment = Deployment.model_validate(data)
    except ValidationError as error:
        findings = [*findings_of(error, Deployment), *_name_findings(data)]
        count = max(len(findings), error.error_count())
        raise DeploymentInvalid(f"the deployment breaks {counted(count, 'rule')}", findings) from error
    warnings = {where: each for where, value in dropped.items() if (each := _unserved(where, value))}
    ignored = sorted(dropped.keys() - warnings.keys())
    return DeploymentFile(deployment=deployment, ignored=tuple(ignored), warnings=tuple(warnings.values()))


def _unserved(where: str, value: Any) -> Finding | None:
    """Return a warning where a key asks for what is not done."""
    usual, fix = UNSERVED_KEYS.get(where, (value, ""))
    if value is None or value == usual:
        return None
    expected = "nothing" if usual is None else f"{usual} or nothing"
    return Finding(code="W_UNSERVED", where=where, expected=expected, found=_repr.repr(value), fix=fix)


def parse_lora_configuration(**fields: Any) -> LoraConfiguration:
    """Return ceilings from unchecked values; raise DeploymentInvalid with one finding per bad value."""
    try:
        return LoraConfiguration.model_validate(fields)
    except ValidationError as error:
        raise DeploymentInvalid("bad ceilings", findings_of(error, LoraConfiguration)) from error


def findings_of(error: ValidationError, model: type[BaseModel]) -> list[Finding]:
    """One finding per violation, up to a number, with the nearest known key beside an unknown one."""
    items = (item for item in error.errors(include_url=False) if not _is_about_names(item))
    return [_finding(item, model) for item in islice(items, MAX_FINDINGS)]


def _is_about_names(item: Any) -> bool:
    return isinstance(item.get("ctx", {}).get("error"), NamesInvalid)


def _finding(item: Any, model: type[BaseModel]) -> Finding:
    loc = [part for part in item["loc"] if part != "[key]"]
    where = ".".join(str(part)[:256] for part in loc) or "deployment"
    if item["type"] == "extra_forbidden":
        known = _known_keys(model, loc[:-1])
        name = str(loc[-1])
        near = nearest(name, known)
        return Finding(
            code="E_UNKNOWN_FIELD",
            where=where,
            expected=f"one of {', '.join(known)}",
            found=name[:80],
            fix=f"Did you mean {near}?" if near else "Remove it.",
        )
    if item["type"] == "missing":
        return Finding(code="E_MISSING_FIELD", where=where, expected="a value", found="nothing", fix="Set it.")
    value = item["input"]
    # YAML reads 1234567 and 2024-01-31 as a number and a date.
    unquoted = item["type"] == "string_type" and isinstance(value, Hashable) and value is not None
    return Finding(
        code="E_BAD_FIELD",
        where=where,
        expected=expected_of(item["msg"]),
        # An address with a signature; a private key where a public one should be.
        found=re.sub(r"\?.*|-----BEGIN.*", "***", _repr.repr(value)) if loc else "",
        fix="Quote it." if unquoted else NAME_RULE if item["type"] == "string_pattern_mismatch" else "",
    )


_repr = reprlib.Repr()
_repr.maxlevel = 2  # a few lines of YAML can unfold to millions of values
_repr.maxstring = _repr.maxother = 80


def _name_findings(data: dict[Any, Any]) -> list[Finding]:
    """Judge names as `Deployment` does, which says nothing of them while anything else is wrong."""
    build, runtime = data.get("build", {}), data.get("runtime", {})
    if not isinstance(build, dict) or not isinstance(runtime, dict):
        return []
    adapters, aliases = build.get("lora_adapters", {}), runtime.get("aliases", {})
    base: Any = runtime.get("served_model_name") or data.get("model_name")
    serve_base = runtime.get("serve_base", True)
    weights = aliases.values() if isinstance(aliases, dict) else [None]
    whole = isinstance(base, str) and isinstance(adapters, dict) and isinstance(serve_base, bool)
    if not whole or not all(isinstance(each, dict) for each in weights):
        return []
    if not all(isinstance(name, str) for name in (*adapters, *aliases)):
        return []
    merge_always = runtime.get("merge") in (Merge.ALWAYS, Merge.ALWAYS.value)
    return list(ModelNames(base, adapters, aliases, serve_base, merge_always).findings(in_file=True))


def _known_keys(model: type[BaseModel], loc: list[Any]) -> list[str]:
    """The keys of the model that stands at loc, through dicts of models."""
    current: Any = model
    for part in loc:
        field = current.model_fields.get(part) if hasattr(current, "model_fields") else None
        if field is not None:
            inner = [a for a in (field.annotation, *_args(field.annotation)) if hasattr(a, "model_fields")]
            current = inner[0] if inner else current
    return list(current.model_fields)


def _args(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", ())


def _unwrap(data: dict[Any, Any]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Lift the ``trt_llm`` block to the top and return the keys that mean nothing here beside the rest."""
    ignored: dict[str, Any] = {}
    top = dict(data)
    if "trt_llm" in top:
        inner = top.pop("trt_llm")
        if not isinstance(inner, dict):
            raise DeploymentInvalid(f"trt_llm must be a mapping; found {type(inner).__name__}")
        block = _drop(inner, "trt_llm", "trt_llm", ignored)
        top = _drop(top, "", "", ignored)
        if twice := sorted(map(str, top.keys() & block.keys())):
            raise DeploymentInvalid(f"{', '.join(twice)}: set both inside and outside trt_llm. Remove one.")
        top |= block
    else:
        runtime = top.pop("runtime", None)
        top = _drop(top, "", "", ignored)
        top = _drop(top, "trt_llm", "", ignored)
        if runtime is not None:
            top["runtime"] = runtime
    for name in ("build", "runtime"):
        if isinstance(top.get(name), dict):
            top[name] = _drop(_without_empty(top[name]), name, name, ignored)
    return _without_empty(top), ignored


def _without_empty(block: dict[Any, Any]) -> dict[Any, Any]:
    """Return a block without the optional blocks that have a key and nothing else."""
    optional = {"runtime", "lora_adapters", "lora_configuration", "aliases", "limits"}
    optional |= {"signed_by", "base_signed_by"}
    return {key: value for key, value in block.items() if key not in optional or value is not None}


def _drop(block: dict[Any, Any], table: str, prefix: str, ignored: dict[str, Any]) -> dict[Any, Any]:
    known = IGNORED_KEYS[table]
    ignored |= {f"{prefix}.{key}".lstrip("."): value for key, value in block.items() if key in known}
    return {key: value for key, value in block.items() if key not in known}


def _name_of(path: Path) -> str:
    return re.sub(r"[^a-zA-Z0-9_\-.:]", "-", path.resolve().stem).lstrip("-.")[:128]


def _signers(field: str, words: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Return signers with the contents of their files: what reads them next is another machine."""
    signers, findings = list[str](), list[Finding]()
    for word in words:
        try:
            signers.append(read_signer(word, folder))
        except ValueError as error:
            where = f"build.{field}"
            findings.append(Finding(code="E_BAD_FIELD", where=where, expected=str(error), found=word[:80]))
    if findings:
        raise DeploymentInvalid(f"build.{field} names signers that are not valid", findings)
    return tuple(signers)


def _resolve_local(deployment: Deployment, folder: Path) -> Deployment:
    def resolved(repository: Repository) -> Repository:
        if repository.source is not SourceKind.LOCAL:
            return repository
        try:
            path = (folder / Path(repository.repo).expanduser()).resolve()
            str(path).encode()
        except (OSError, RuntimeError, ValueError) as error:  # no such user, a loop, a NUL, no UTF-8
            raise DeploymentInvalid(f"LOCAL repository {repository.repo!r} is not a path: {error}") from error
        return repository.model_copy(update={"repo": str(path)})

    build = deployment.build
    update = {
        "checkpoint_repository": resolved(build.checkpoint_repository),
        "lora_adapters": {name: resolved(repository) for name, repository in build.lora_adapters.items()},
        "signed_by": _signers("signed_by", build.signed_by, folder),
        "base_signed_by": _signers("base_signed_by", build.base_signed_by, folder),
    }
    runtime = deployment.runtime
    if (speculator := runtime.speculator) is not None:
        speculator = speculator.model_copy(update={"model": resolved(speculator.model)})
    of_runtime = runtime.model_copy(update={"speculator": speculator})
    return deployment.model_copy(update={"build": build.model_copy(update=update), "runtime": of_runtime})
