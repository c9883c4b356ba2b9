"""Warnings about what is legal."""

from collections.abc import Sequence

from builder_service.domain.adapter_config import AdapterConfig
from builder_service.domain.config_fields import FILE
from builder_service.domain.grouping import Grouping
from builder_service.domain.pairs import Pair
from builder_service.domain.peft_names import ends
from builder_service.domain.tensor_names import LoraKey, TokensKey
from loramux_shared.bases.config import ModelConfig
from loramux_shared.faults import Finding


def legal_findings(
    pairs: list[Pair], keys: Sequence[LoraKey | TokensKey], config: AdapterConfig, base: ModelConfig
) -> list[Finding]:
    """Return the warnings about an adapter that can be served."""
    leaves = {pair.key.leaf for pair in pairs}
    return [
        *_narrow_heads(pairs, base),
        *_no_rank(pairs, config),
        *_alpha_order(pairs, config),
        *_targets(keys, leaves, config),
    ]


def _narrow_heads(pairs: list[Pair], base: ModelConfig) -> list[Finding]:
    hidden = base.dims.hidden
    other = {pair.a.shape[1] for pair in pairs if pair.key.leaf == "o_proj"} - {hidden}
    if not other:
        return []
    expected, found = f"heads * head_dim = hidden {hidden}", ", ".join(map(str, sorted(other)))
    fix = "loramux serves it; TensorRT-LLM could not read these rows."
    return [Finding(code="W_ODENSE", where="o_proj", expected=expected, found=found, fix=fix)]


def _no_rank(pairs: list[Pair], config: AdapterConfig) -> list[Finding]:
    if config.rank is not None:
        return []
    ranks = ", ".join(map(str, sorted({pair.trained_rank for pair in pairs})))
    return [Finding(code="W_RANK", where=f"{FILE}: r", expected="a rank", found=f"none; tensors: {ranks}")]


def _alpha_order(pairs: list[Pair], config: AdapterConfig) -> list[Finding]:
    report = Grouping()
    for pair in pairs:
        alphas = config.alphas_of(pair.key.name)
        if len(set(alphas)) > 1:
            report.add(
                "W_PATTERN_ORDER",
                pair.place,
                expected=f"{FILE}: one alpha_pattern that matches",
                found=f"alphas {', '.join(f'{alpha:g}' for alpha in alphas[:5])}; the first is taken",
                fix="PEFT sorts patterns when it saves: make sure that the first is what it was trained with.",
            )
    return report.findings()


def _targets(keys: Sequence[LoraKey | TokensKey], leaves: set[str], config: AdapterConfig) -> list[Finding]:
    """PEFT does not mind a target that matches no module; people do."""
    where, targets = f"{FILE}: target_modules", config.target_modules
    if config.default_for and not config.target_parameters:
        listed = ", ".join(sorted(leaves))
        fix = f"Set it to the modules that were trained; the tensors are of {listed}."
        expected = "names or a pattern; PEFT's choice where there are none depends on its version"
        return [Finding(code="W_TARGETS", where=where, expected=expected, found=config.default_note, fix=fix)]
    matched = {end for key in keys for end in ends(key.name)}
    missing = [name for name in targets or () if isinstance(targets, tuple) and name not in matched]
    if not missing:
        return []
    listed = ", ".join(name[:80] for name in missing[:5])
    return [Finding(code="W_TARGETS", where=where, expected="tensors of each", found=f"none of {listed}")]
