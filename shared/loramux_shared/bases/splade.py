"""Encoders that make sparse vectors, as SPLADE (arXiv:2109.10086) does by masked language modelling.

`modules.json` of such a base, as sentence-transformers writes it, names a module ``SpladePooling``.
"""

from pathlib import Path
from typing import Final

from loramux_shared.bases.families.encoders import EncoderConfig
from loramux_shared.bases.hf_config import HfConfig, read_json
from loramux_shared.faults import CheckpointInvalid

SPLADE: Final = "1_SpladePooling/config.json"
"""Config of the module."""
ACTIVATIONS: Final = {"relu": 1, "log1p_relu": 2}
"""How often each of its activations takes log(1 + x)."""
PREDICTS: Final = "ForMaskedLM"


def sparse_logs_in(folder: Path, model: EncoderConfig) -> int:
    """Return how often a sparse vector takes log(1 + x); 0 where the base in a folder makes none.

    Raise CheckpointInvalid for sparse vectors that are made otherwise, or by a head that is not served.
    """
    fields = read_json(folder / SPLADE)
    if fields is None:
        return 0
    if model.vocabulary_head is None or not model.architecture.endswith(PREDICTS):
        raise CheckpointInvalid(
            f"{SPLADE}: expected a base of ...{PREDICTS} whose head is served, found {model.architecture}. "
            "Remove the file to serve the base without sparse vectors."
        )
    whole = HfConfig(fields, model.architecture)
    if (strategy := whole.text("pooling_strategy", "max")) != "max":
        raise CheckpointInvalid(f"{SPLADE}: pooling_strategy: expected max, found {strategy!r:.80}.")
    activation = whole.text("activation_function", "relu")
    if activation not in ACTIVATIONS:
        expected = " or ".join(ACTIVATIONS)
        raise CheckpointInvalid(
            f"{SPLADE}: activation_function: expected {expected}, found {activation!r:.80}."
        )
    return ACTIVATIONS[activation]
