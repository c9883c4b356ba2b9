"""The weights of few bits in a file, and the tensors that each of them consists of."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, cast

from inference_service.engine.models.lowbit.awq import Awq
from inference_service.engine.models.lowbit.bitsandbytes import STATE, EightBits, FourBits
from inference_service.engine.models.lowbit.gptq import Gptq
from inference_service.engine.models.lowbit.mxfp4 import Mxfp4
from inference_service.engine.models.lowbit.pack_quantized import PackQuantized
from inference_service.engine.models.lowbit.scaled import Scaled
from inference_service.engine.models.packed import Packed, PackedLayout, Pieces
from loramux_shared.bases.formats import load_formats
from loramux_shared.faults import CheckpointInvalid

WEIGHT: Final = "weight"
LAYOUTS: Final[Mapping[str, tuple[PackedLayout, ...]]] = {
    "fp8": (PackedLayout(("weight_scale_inv", "weight_scale"), Scaled, frozenset({"weight"})),),
    "compressed-tensors": (
        PackedLayout(
            ("weight_packed",),
            PackQuantized,
            frozenset({"weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"}),
        ),
        PackedLayout(("weight_scale",), Scaled, frozenset({"weight", "weight_zero_point"})),
    ),
    "gptq": (PackedLayout(("qweight",), Gptq, frozenset({"qzeros", "scales", "g_idx"})),),
    "awq": (PackedLayout(("qweight",), Awq, frozenset({"qzeros", "scales"})),),
    "bitsandbytes": (
        PackedLayout(
            tuple(STATE),
            FourBits,
            frozenset(
                {
                    "weight",
                    "weight.absmax",
                    "weight.quant_map",
                    "weight.nested_absmax",
                    "weight.nested_quant_map",
                }
            ),
        ),
        PackedLayout(("SCB",), EightBits, frozenset({"weight", "weight_format"})),
    ),
    "mxfp4": (PackedLayout(("weight_blocks",), Mxfp4, frozenset({"weight_scales"})),),
}
"""Layouts of our formats, by their names; other packages bring those of theirs."""
BESIDE: Final = frozenset(
    {
        *("bias", "weight_bias"),
        *("activation_scale", "input_scale", "input_scale_ub", "input_zero_point", "weight_activation_scale"),
    }
)
"""Tensors that may stand beside a weight.

Those that are read on their own, and those that round activations.
"""


OF_PARAMETERS: Final = ("_scale_inv", "_blocks")
"""Marks of experts' weights, which are parameters with names of their own."""


def layouts_of(format_: str) -> Sequence[PackedLayout]:
    """Return the layouts of a format of ours, or of another package."""
    if (own := LAYOUTS.get(format_)) is not None:
        return own
    brought = (each.layouts() for each in load_formats() if each.name == format_ and each.layouts is not None)
    return [cast(PackedLayout, layout) for layouts in brought for layout in layouts]


class Found:
    """The weights of few bits among the tensors of a checkpoint."""

    def __init__(self, format_: str, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._sorted = sorted(self._names)
        self._open: dict[str, PackedLayout] = {}
        for layout in layouts_of(format_):
            for mark in layout.marks:
                for name in self._sorted:
                    weight = _marked(name, mark)
                    if weight is not None and weight not in self._open:
                        self._open[weight] = layout

    def __contains__(self, name: str) -> bool:
        return name in self._open

    def parts(self, name: str) -> dict[str, str]:
        """Return the names of the tensors that a weight is made of, by their roles.

        Raises:
            CheckpointInvalid: one stands beside it that is not read.
        """
        layout = self._open[name]
        known = layout.others.union(layout.marks)
        roles = {role: each for each in self._beside(name) if (role := _role(name, each)) not in BESIDE}
        for role, each in roles.items():
            if role not in known:
                raise CheckpointInvalid(f"{each}: it stands beside {name}, and is not read.")
        return roles

    def open(self, pieces: Pieces) -> Packed:
        """Return a weight.

        Raises:
            CheckpointInvalid: its tensors do not go together.
        """
        return self._open[pieces.name].open(pieces)

    def _beside(self, name: str) -> list[str]:
        """Return the tensors of a weight's linear; of a parameter that is not called weight, its own."""
        of_linear = name.endswith(f".{WEIGHT}")
        prefix = name.removesuffix(WEIGHT) if of_linear else f"{name}_"
        found = [] if of_linear or name not in self._names else [name]
        at = bisect_left(self._sorted, prefix)
        while at < len(self._sorted) and self._sorted[at].startswith(prefix):
            found.append(self._sorted[at])
            at += 1
        return found


def _marked(name: str, mark: str) -> str | None:
    """Return the weight that a tensor marks; what is not called weight is marked by what follows its name."""
    if name.endswith(f".{mark}"):
        return name.removesuffix(mark) + WEIGHT
    suffix = mark.removeprefix(WEIGHT)
    return name.removesuffix(suffix) if suffix in OF_PARAMETERS and name.endswith(suffix) else None


def _role(weight: str, name: str) -> str:
    """Return what a tensor is of a weight's."""
    if weight.endswith(f".{WEIGHT}"):
        return name[len(weight) - len(WEIGHT) :]
    return WEIGHT + name[len(weight) :]
