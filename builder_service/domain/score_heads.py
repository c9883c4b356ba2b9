"""The score head of an adapter that classifies: PEFT's ``task_type: SEQ_CLS``, with transformers' ``score``.

``AutoModelForSequenceClassification`` of a decoder has a linear without a bias on the last hidden state. PEFT
saves it whole, and names ``classifier`` beside ``score`` in ``modules_to_save``, whichever there is.
"""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from builder_service.domain.adapter_config import AdapterConfig
from builder_service.domain.full_tensors import FullTensor
from builder_service.domain.grouping import Grouping
from builder_service.domain.rules.texts import bad_text
from builder_service.domain.safetensors_header import READABLE, Tensor, TensorFile
from loramux_shared.adapter_files import MODEL_CONFIG
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bundle.manifest import MAX_LABEL, MAX_LABELS, PROBLEM_TYPES, ScoreHead, names_of_labels
from loramux_shared.faults import Finding
from loramux_shared.untrusted_json import JsonInvalid, excerpt, parse_strict_json

SCORE: Final = "score"
SAVED: Final = (SCORE, "classifier")
PIECE_ELEMENTS: Final = 1 << 18
_AGAIN: Final = "Save the adapter with the head that it was trained with: PEFT does so for task_type SEQ_CLS."


@dataclass(frozen=True)
class PlannedScore:
    """A head, and the tensor that it is read from."""

    head: ScoreHead
    file: TensorFile
    tensor: str


def plan_score(
    file: TensorFile, fulls: list[FullTensor], config: AdapterConfig, base: ModelConfig, report: Grouping
) -> tuple[PlannedScore | None, list[FullTensor], tuple[str, ...]]:
    """Return the head of an adapter that classifies, and what is left of whole matrices and saved modules.

    Without ``task_type`` SEQ_CLS it is not known what the head is to be read from, so nothing is taken.
    """
    if not config.classifies:
        return None, fulls, config.modules_to_save
    if config.of_tokens:
        fix = "Train it on an encoder, or to classify whole texts, with task_type SEQ_CLS."
        found = f"a base of {base.architecture}"
        report.add("E_TASK", "task_type TOKEN_CLS", expected="an encoder as base", found=found, fix=fix)
    own = [full for full in fulls if full.key.name == SCORE and not full.key.of_base]
    rest = [full for full in fulls if full not in own]
    saved = tuple(name for name in config.modules_to_save if name not in SAVED)
    planned = None if config.of_tokens else _plan_head(file, own, base.dims.hidden, report)
    return planned, rest, saved


def _plan_head(file: TensorFile, own: list[FullTensor], hidden: int, report: Grouping) -> PlannedScore | None:
    """Return the head that the tensors of an adapter's ``score`` make; None where they make none."""
    expected = f"one score.weight [1 to {MAX_LABELS} labels, {hidden}], and no bias"
    if len(own) != 1 or own[0].key.kind != "weight":
        found = ", ".join(full.tensor.name for full in own) or "no tensors of a score head"
        report.add("E_TASK", "task_type SEQ_CLS", expected=expected, found=found, fix=_AGAIN)
        return None
    tensor = own[0].tensor
    fits = len(tensor.shape) == 2 and tensor.shape[1] == hidden and 1 <= tensor.shape[0] <= MAX_LABELS
    if not fits or tensor.dtype not in READABLE:
        found = f"{tensor.dtype} {list(tensor.shape)}"
        report.add("E_TASK", tensor.name, expected=f"{expected}, in F32, F16 or BF16", found=found, fix=_AGAIN)
        return None
    _check_finite(file, tensor, report)
    head = ScoreHead(num_labels=tensor.shape[0], hidden_size=hidden)
    return PlannedScore(head, file, tensor.name)


def _check_finite(file: TensorFile, tensor: Tensor, report: Grouping) -> None:
    bad = sum(
        int(np.count_nonzero(~np.isfinite(piece.astype(np.float32))))
        for piece in file.pieces(tensor.name, PIECE_ELEMENTS)
    )
    if bad:
        fix = "Training diverged: use an earlier checkpoint."
        report.add("E_NAN", tensor.name, expected="finite values", found=f"{bad} NaN or infinite", fix=fix)


def with_labels(planned: PlannedScore, data: bytes) -> tuple[PlannedScore, list[Finding]]:
    """Return a head with what a ``config.json`` beside it says of its labels, and what is wrong there."""
    try:
        fields = parse_strict_json(data)
    except JsonInvalid as error:
        return planned, [bad_text(MODEL_CONFIG, "", "a JSON object", f"invalid JSON ({error})")]
    if not isinstance(fields, dict):
        return planned, [bad_text(MODEL_CONFIG, "", "a JSON object", excerpt(fields))]
    findings = []
    kind, labels, count = fields.get("problem_type"), fields.get("id2label"), planned.head.num_labels
    if kind is not None and kind not in PROBLEM_TYPES:
        findings.append(
            bad_text(MODEL_CONFIG, "problem_type", f"one of {', '.join(PROBLEM_TYPES)}", excerpt(kind))
        )
    names = () if labels is None else names_of_labels(labels, count)
    if names is None:
        expected = f"an object with a name of at most {MAX_LABEL} characters for each of 0 to {count - 1}"
        findings.append(bad_text(MODEL_CONFIG, "id2label", expected, excerpt(labels)))
    if findings:
        return planned, findings
    head = planned.head.model_copy(update={"problem_type": kind, "id2label": names})
    return replace(planned, head=head), []
