"""Validate: every adapter against every rule, before anything is written; those of a build several at once."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Final, TypeAlias

from builder_service.domain.full_tensors import EMBED_FIX
from builder_service.domain.rules.adapter import check_adapter, most_tensors
from builder_service.domain.rules.checked import CheckedAdapter, ComparedTokens, Rulebook
from builder_service.domain.rules.tensors import AdapterLimits
from builder_service.domain.rules.texts import check_texts
from builder_service.domain.safetensors_header import HeaderInvalid, read_header
from builder_service.domain.score_heads import with_labels
from builder_service.pipeline import gguf_files, npy_files
from builder_service.pipeline.base_tokens import BaseTokens
from builder_service.pipeline.base_weights import BaseWeights
from builder_service.pipeline.context import BuildContext, Space
from builder_service.pipeline.fetch import FetchedAdapter, ListedAdapter, fetch_adapter, gather
from builder_service.pipeline.progress import Progress, Stage
from builder_service.pipeline.truncation import truncate_adapter
from loramux_shared.adapter_files import CONFIG, MODEL_CONFIG, WEIGHTS, weight_files
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.files import GGUF_SUFFIX
from loramux_shared.bundle.added_tokens import AddedToken, OwnTokens
from loramux_shared.bundle.manifest import TEXT_FILES
from loramux_shared.bundle.modules import BY_HF, BY_NAME
from loramux_shared.deployment import Deployment, Dtype, LoraConfiguration
from loramux_shared.faults import AdapterInvalid, DeploymentInvalid, Finding
from loramux_shared.wording import counted, listed

# TensorRT-LLM's other modules: deployment files name these as a ceiling, and adapters here have none.
OTHER_MODULES: Final = frozenset({
    "attn_qkv", "cross_attn_dense", "cross_attn_k", "cross_attn_q", "cross_attn_qkv", "cross_attn_v",
    "mlp_gate_up", "mlp_router", "moe_4h_to_h", "moe_gate", "moe_h_to_4h", "moe_router",
})  # fmt: skip


UNLIMITED: Final = 1 << 30
"""No rank is too high where it is truncated."""
HEAVY_FILE_BYTES: Final = 32 << 20
HEAVY_TENSOR_BYTES: Final = 8 << 20
"""The rules hold A and B of one row; rows of larger tensors, in larger files, are looked at one by one."""
# As a ceiling, a fused module allows its parts.
FUSED_NAMES: Final = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "mlp_gate_up": ("mlp_h_to_4h", "mlp_gate")}

Identity: TypeAlias = tuple[tuple[str, str], ...]
"""Names and sha256 of an adapter's files: what, beside the deployment, its bundle follows from."""


@dataclass(frozen=True)
class ValidAdapter:
    """An adapter that can be converted."""

    fetched: FetchedAdapter
    checked: CheckedAdapter


def rulebook(model: ModelConfig, lora: LoraConfiguration, base: BaseWeights) -> Rulebook:
    """Return the rules of a deployment, from its base and its ceilings."""
    targets = {part for name in lora.lora_target_modules for part in FUSED_NAMES.get(name, (name,))}
    max_rank = UNLIMITED if lora.truncate_to_rank else lora.max_lora_rank
    limits = AdapterLimits(model, max_rank, frozenset(targets))
    dtype = lora.dtype or storage_dtype(model)
    tokens = BaseTokens(base.files, base.fetch, limits.base.dims.vocab)
    return Rulebook(limits, (model.architecture,), dtype, base, tokens, lora.truncate_to_rank)


def storage_dtype(model: ModelConfig) -> Dtype:
    """Return the type that a base's weights have; bfloat16 where the config does not say."""
    return Dtype(model.dtype) if model.dtype in set(Dtype) else Dtype.BFLOAT16


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
    lora = deployment.build.lora_configuration
    if lora.truncate_to_rank and lora.truncate_to_rank > lora.max_lora_rank:
        raise DeploymentInvalid.of_field(
            "truncate_to_rank is above the ceiling",
            "build.lora_configuration.truncate_to_rank",
            f"at most max_lora_rank {lora.max_lora_rank}",
            str(lora.truncate_to_rank),
            "Lower it, or raise max_lora_rank.",
        )


def refuse_any(checked: Mapping[str, CheckedAdapter]) -> None:
    """Raise `AdapterInvalid`, with every violation of every adapter, unless there is none."""
    violations = {name: adapter.errors for name, adapter in checked.items() if adapter.errors}
    findings = [_named(finding, name) for name, errors in violations.items() for finding in errors]
    if findings:
        rules = counted(len(findings), "rule")
        raise AdapterInvalid(f"{listed(violations)}: {rules} broken; nothing was published", findings)


def check_fetched(adapter: FetchedAdapter, rules: Rulebook, progress: Progress) -> CheckedAdapter:
    """Check one adapter against every rule; truncate it where the deployment wishes."""
    if adapter.findings:
        return CheckedAdapter(adapter.findings)
    progress.enter(adapter.name, Stage.VALIDATING, sum(file.size for file in adapter.files.values()))
    count, folder = progress.counter(adapter.name), adapter.folder
    used = weight_files(adapter.files)
    if CONFIG in used:
        checked = check_adapter(folder, rules, count)
    else:
        checked = container_of(used).check(folder, rules, count)
    texts = {name: (folder / name).read_bytes() for name in TEXT_FILES if name in adapter.files}
    vocab = checked.vocab or rules.limits.base.dims.vocab
    tokens = rules.tokens.compare(folder, adapter.files) if rules.tokens else ComparedTokens()
    found = [*check_texts(texts, vocab), *tokens.findings, *_without_rows(tokens.added, vocab)]
    if checked.vocab and checked.vocab < rules.limits.base.dims.vocab:
        found += _cut_off(checked.vocab, rules)
    own = OwnTokens(vocab=vocab, tokens=tokens.added) if tokens.added or checked.vocab else None
    score = checked.score
    if score is not None and MODEL_CONFIG in adapter.files:
        score, wrong = with_labels(score, (folder / MODEL_CONFIG).read_bytes())
        found += wrong
    checked = replace(checked, findings=(*checked.findings, *found), own_tokens=own, score=score)
    if checked.errors or rules.truncate_to_rank is None:
        return checked
    return truncate_adapter(checked, rules.truncate_to_rank, rules.dtype, folder, count)


def container_of(used: Sequence[str]) -> ModuleType:
    """Return the reader of an adapter whose files are not PEFT's."""
    return gguf_files if used[0].endswith(GGUF_SUFFIX) else npy_files


def _without_rows(added: Sequence[AddedToken], vocab: int) -> list[Finding]:
    """Return a finding where tokens have no rows, of the adapter's own or unused ones of the base."""
    beyond = [f"{token.content[:40]} (id {token.id})" for token in added if token.id >= vocab]
    if not beyond:
        return []
    expected, fix = f"rows for them; there are {vocab}", f"{EMBED_FIX} For padding alone, remove the tokenizer."
    return [
        Finding(code="E_EMBED", where="tokenizer.json", expected=expected, found=listed(beyond, 5), fix=fix)
    ]


def _cut_off(vocab: int, rules: Rulebook) -> list[Finding]:
    """Return a finding where tokens of the base have no rows any more: more than its padding was cut off."""
    last = rules.tokens.last if rules.tokens else rules.limits.base.dims.vocab - 1
    if vocab > last:
        return []
    expected, found = f"rows for the base's tokens, at least {last + 1}", f"{vocab} rows"
    where = "embeddings and head"
    return [Finding(code="E_EMBED", where=where, expected=expected, found=found, fix=EMBED_FIX)]


def _named(finding: Finding, adapter: str) -> Finding:
    return finding.model_copy(update={"adapter": adapter})


@dataclass
class Intake:
    """The incoming adapters of one build, which are fetched into its work folder and validated."""

    rules: Rulebook
    context: BuildContext
    space: Space
    work: Path
    progress: Progress
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _checks: dict[Identity, Future[CheckedAdapter]] = field(default_factory=dict)

    def take_in(self, listed: Sequence[ListedAdapter]) -> list[ValidAdapter]:
        """Fetch and validate adapters; in their order.

        Raises:
            AdapterInvalid: with every violation of every adapter.
            ResourcesExhausted: the disk has no room for them.
            Fault: what sources raise, of all adapters.
        """
        self.space.check(sum(adapter.size for adapter in listed), "the adapters")
        with ThreadPoolExecutor(self.context.parallel_adapters, "intake") as pool:
            futures = {
                adapter.name: pool.submit(self._take_in, adapter, self.work / f"adapter-{i}")
                for i, adapter in enumerate(listed)
            }
        taken = gather(futures, self.progress)
        refuse_any({adapter.fetched.name: adapter.checked for adapter in taken})
        return taken

    def judge(self, fetched: FetchedAdapter) -> ValidAdapter:
        """Validate an adapter that is in the work folder; raise AdapterInvalid with every violation."""
        checked = self._check(fetched)
        refuse_any({fetched.name: checked})
        return ValidAdapter(fetched, checked)

    def _take_in(self, listed: ListedAdapter, folder: Path) -> ValidAdapter:
        with self.space.writing(listed.size, f"adapter {listed.name!r}"):
            fetched = fetch_adapter(listed, folder, self.progress)
        checked = self._check_once(fetched)
        if checked.errors:
            self.progress.update(listed.name, stage=Stage.REFUSED)
        return ValidAdapter(fetched, checked)

    def _check_once(self, fetched: FetchedAdapter) -> CheckedAdapter:
        """Check an adapter, unless one with the very same files was checked, or is being."""
        if not fetched.files:
            return self._check(fetched)
        with self._lock:
            found = self._checks.get(identity(fetched))
            future = self._checks.setdefault(identity(fetched), Future())
        if found is not None:  # another thread runs the check: this one only waits
            self.progress.enter(fetched.name, Stage.VALIDATING)
            return found.result()
        try:
            checked = self._check(fetched)
        except BaseException as error:
            future.set_exception(error)
            raise
        future.set_result(checked)
        return checked

    def _check(self, fetched: FetchedAdapter) -> CheckedAdapter:
        heavy = self.context.heavy if self._largest_tensor(fetched) > HEAVY_TENSOR_BYTES else nullcontext()
        with heavy, self.context.compute:
            return check_fetched(fetched, self.rules, self.progress)

    def _largest_tensor(self, fetched: FetchedAdapter) -> int:
        """Return the bytes of the largest tensor of a large file; of the file where that is not known."""
        size = max((file.size for file in fetched.files.values()), default=0)
        if size <= HEAVY_FILE_BYTES:
            return 0
        if WEIGHTS not in fetched.files:
            return size
        try:
            tensors = read_header(fetched.folder / WEIGHTS, most_tensors(self.rules.limits.base)).tensors
        except HeaderInvalid:  # which the rules will say
            return 0
        return max((tensor.size for tensor in tensors.values()), default=0)


def identity(fetched: FetchedAdapter) -> Identity:
    """Return what two adapters have in common whose bundles are one."""
    return tuple(sorted((name, file.sha256) for name, file in fetched.files.items()))
