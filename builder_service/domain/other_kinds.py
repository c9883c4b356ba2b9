"""Kinds that are a LoRA in disguise, and DoRA of embeddings and head: the rules of an extension."""

from dataclasses import dataclass
from typing import Final, Protocol

from builder_service.domain.adapter_config import AdapterConfig
from builder_service.domain.derived import Derived
from builder_service.domain.full_tensors import BaseTensors
from builder_service.domain.grouping import Grouping
from builder_service.domain.kinds import Kind
from builder_service.domain.own_rows import PlannedRows
from builder_service.domain.pairs import Pair
from builder_service.domain.safetensors_header import TensorFile
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bundle.modules import NO_LAYER
from loramux_shared.extensions import need_extension
from loramux_shared.faults import SettingsInvalid

_MARKS: Final = {".lora_": Kind.LORA, ".ia3_l": Kind.IA3}
SAVE: Final = "Save the adapter again with PEFT, under the kind that its config says."


@dataclass(frozen=True)
class Expanded:
    """A file in the words of LoRA."""

    file: TensorFile
    idle: tuple[str, ...] = ()
    """Tensors without elements: of modules that AdaLoRA left no rank."""


class OtherKinds(Protocol):
    """The functions of the extension's module."""

    def expanded(self, file: TensorFile, kind: Kind, base: ModelConfig, report: Grouping) -> Expanded:
        """Return a file that has A and B for each module of AdaLoRA, VeRA, LoHa or LoKr."""
        ...

    def with_initial(
        self,
        file: TensorFile,
        pairs: list[Pair],
        config: AdapterConfig,
        base: BaseTensors | None,
        report: Grouping,
    ) -> tuple[TensorFile, list[Pair]]:
        """Return pairs of PiSSA or OLoRA that change the whole base, and the file to read them from."""
        ...

    def with_dora_tables(
        self,
        dora: list[Pair],
        file: TensorFile,
        pairs: list[Pair],
        config: AdapterConfig,
        base: ModelConfig,
        weights: BaseTensors | None,
        report: Grouping,
    ) -> tuple[TensorFile, list[Pair], list[PlannedRows]]:
        """Return the pairs that stay A and B, and the rows that those of embeddings and head become."""
        ...


def _extension(code: str, place: str, what: str, report: Grouping) -> OtherKinds | None:
    """Return the extension, or None and report that it is not installed."""
    try:
        found: OtherKinds = need_extension("kinds", what)
    except SettingsInvalid:
        fix = "Install it beside the builder: pip install 'loramux[kinds]'."
        report.add(code, place, expected=f"the extension 'kinds' for {what}", found="none installed", fix=fix)
        return None
    return found


def is_foreign(name: str, kind: Kind, report: Grouping) -> bool:
    """Return True for the key of a tensor of another kind than the config says, and report it."""
    if not any(mark in name and kind is not owner for mark, owner in _MARKS.items()):
        return False
    found = f"keys of another kind than {kind}"
    report.add("E_UNKNOWN_KEY", name, expected=f"keys of {kind}", found=found, fix=SAVE, places_listed=10)
    return True


def expanded(file: TensorFile, kind: Kind, base: ModelConfig, report: Grouping) -> Expanded:
    """Return a file that has A and B for each module, of any kind; report what does not fit together."""
    if kind not in (Kind.LORA, Kind.IA3) and (
        extension := _extension("E_NOT_LORA", "adapter_config.json: peft_type", kind, report)
    ):
        return extension.expanded(file, kind, base, report)
    tensors = {name: each for name, each in file.tensors.items() if not is_foreign(name, kind, report)}
    return Expanded(Derived(file.path, tensors, file, {}))


def with_initial(
    file: TensorFile, pairs: list[Pair], config: AdapterConfig, base: BaseTensors | None, report: Grouping
) -> tuple[TensorFile, list[Pair]]:
    """Return pairs that change the whole base, also where their initialisation took a part of it."""
    where = "adapter_config.json: init_lora_weights"
    if config.initial and (extension := _extension("E_INIT", where, config.initial, report)):
        return extension.with_initial(file, pairs, config, base, report)
    return file, pairs


def with_dora_tables(
    file: TensorFile,
    pairs: list[Pair],
    config: AdapterConfig,
    base: ModelConfig,
    weights: BaseTensors | None,
    report: Grouping,
) -> tuple[TensorFile, list[Pair], list[PlannedRows]]:
    """Return the pairs that stay A and B, and the rows that the others become.

    Where something was reported, all pairs stay.
    """
    dora = [pair for pair in pairs if pair.key.layer == NO_LAYER and pair.magnitude is not None]
    if dora and not report:
        what = "DoRA of embeddings and head"
        if extension := _extension("E_DORA", dora[0].key.place, what, report):
            return extension.with_dora_tables(dora, file, pairs, config, base, weights, report)
    return file, pairs, []
