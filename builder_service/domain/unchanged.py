"""An adapter that changes nothing, though its file is whole.

It was never trained, or all of its matrices are the base's own. PEFT answers as the base does then: so do we.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from builder_service.domain.derived import Derived
from builder_service.domain.expansion import Product
from builder_service.domain.planned import PlannedRow
from builder_service.domain.safetensors_header import Tensor, TensorFile
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bundle.manifest import ModuleRow
from loramux_shared.bundle.modules import BY_NAME
from loramux_shared.faults import Finding

_NAMES: Final = ("zeros.lora_A", "zeros.lora_B")
"""Names of tensors that are made; no key of an adapter is so called."""


def unchanged(file: TensorFile, base: ModelConfig) -> tuple[TensorFile, PlannedRow]:
    """Return a file with A and B of zeros, and their row: a bundle has at least one."""
    module = base.layer_groups[0][0].modules[0]
    inside, out = base.features(module, 0) or (1, 1)
    tensors, recipes = dict(file.tensors), {}
    for name, shape in zip(_NAMES, ((1, inside), (out, 1)), strict=True):
        size = 4 * shape[0] * shape[1]
        tensors[name] = Tensor(name, "F32", shape, 0, size)
        recipes[name] = _zeros(shape)
    row = ModuleRow(
        layer=0,
        module_id=BY_NAME[module].id,
        module=module,
        rank=1,
        in_features=inside,
        out_features=out,
        scale=1.0,
        norm_a=0.0,
        norm_b=0.0,
        norm_ba=0.0,
    )
    return Derived(file.path, tensors, file, recipes), PlannedRow(row, *_NAMES, (0, out))


def _zeros(shape: tuple[int, int]) -> Product:
    return Product((), lambda: np.zeros(shape, np.float32))


def unchanged_warning() -> Finding:
    """Say that answers are the base's."""
    found = "every scale and bias is one that changes nothing, and every matrix is the base's own"
    return Finding(code="W_ZERO_B", found=found, fix="The adapter changes nothing: untrained?")
