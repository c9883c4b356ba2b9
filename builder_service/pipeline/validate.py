"""Validate: every adapter against every rule, before anything is written to the store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from builder_service.domain.rules import CheckedAdapter, Rulebook, check_adapter
from builder_service.domain.tensor_rules import Limits
from builder_service.pipeline.fetch import FetchedAdapter
from builder_service.pipeline.progress import Progress, Stage
from shared.bundle.modules import BY_HF, BY_NAME, BaseDims
from shared.deployment import Deployment, Dtype, LoraConfiguration
from shared.faults import AdapterInvalid, DeploymentInvalid, Finding

# TensorRT-LLM's other modules: deployment files name them as a ceiling, adapters here have none of them.
OTHER_MODULES: Final = frozenset({
    "attn_qkv", "cross_attn_dense", "cross_attn_k", "cross_attn_q", "cross_attn_qkv", "cross_attn_v",
    "mlp_gate_up", "mlp_router", "moe_4h_to_h", "moe_gate", "moe_h_to_4h", "moe_router",
})  # fmt: skip


@dataclass(frozen=True)
class ValidAdapter:
    """An adapter that can be converted."""

    fetched: FetchedAdapter
    checked: CheckedAdapter


def rulebook(config: dict[str, Any], lora: LoraConfiguration) -> Rulebook:
    """Return the rules of a deployment, from the base's ``config.json`` and the deployment's ceilings.

    Raises:
        CheckpointInvalid: the base's sizes are missing.
    """
    limits = Limits(BaseDims.from_config(config), lora.max_lora_rank, frozenset(lora.lora_target_modules))
    architectures = config.get("architectures")
    names = tuple(map(str, architectures)) if isinstance(architectures, list) else ()
    return Rulebook(limits, names, lora.dtype or storage_dtype(config))


def storage_dtype(config: dict[str, Any]) -> Dtype:
    """Return the type that a base's weights have; bfloat16 where the config does not say."""
    text = config.get("text_config")
    for block in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            value = str(block.get(key) or "").removeprefix("torch.")
            if value in set(Dtype):
                return Dtype(value)
    return Dtype.BFLOAT16


def check_deployment(deployment: Deployment) -> None:
    """Raise `DeploymentInvalid` for what can be seen to be wrong before anything is fetched."""
    known = {*BY_NAME, *OTHER_MODULES}
    findings = [
        Finding(
            code="E_BAD_FIELD",
            where="build.lora_configuration.lora_target_modules",
            expected=f"names of modules: {', '.join(BY_NAME)}",
            found=name,
            fix=f"Did you mean {BY_HF[name].name}?" if name in BY_HF else "Correct or remove it.",
        )
        for name in deployment.build.lora_configuration.lora_target_modules
        if name not in known
    ]
    if findings:
        raise DeploymentInvalid("lora_target_modules names modules that do not exist", findings)


def validate_adapters(
    fetched: Iterable[FetchedAdapter], book: Rulebook, progress: Progress
) -> list[ValidAdapter]:
    """Check all adapters.

    Raises:
        AdapterInvalid: with every violation of every adapter.
    """
    valid, violations, refused = [], [], []
    for adapter in fetched:
        checked = _check(adapter, book, progress)
        if checked.errors:
            refused.append(adapter.name)
            violations += [_named(item, adapter.name) for item in checked.errors]
            progress.update(adapter.name, stage=Stage.REFUSED)
        else:
            valid.append(ValidAdapter(adapter, checked))
    if violations:
        rules = f"{len(violations)} rule{'s'[: len(violations) > 1]}"
        raise AdapterInvalid(f"{', '.join(refused)}: {rules} broken; nothing was published", violations)
    return valid


def _check(adapter: FetchedAdapter, book: Rulebook, progress: Progress) -> CheckedAdapter:
    if adapter.findings:
        return CheckedAdapter(adapter.findings)
    progress.enter(adapter.name, Stage.VALIDATING, sum(file.size for file in adapter.files.values()))
    return check_adapter(adapter.folder, book, progress.counter(adapter.name))


def _named(finding: Finding, adapter: str) -> Finding:
    return finding.model_copy(update={"adapter": adapter})
