"""A model family, and the defaults that its file starts from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.layers import AttentionLayer, LayerSpec, MlpLayer
from loramux_shared.bases.rope import AttentionSpec, RopeSpec, read_rope
from loramux_shared.bundle.manifest import MAX_LABEL, PROBLEM_TYPES, names_of_labels
from loramux_shared.bundle.modules import read_dims
from loramux_shared.faults import CheckpointInvalid

ReadRope = Callable[[HfConfig, int, int], tuple[RopeSpec, int]]
"""A reader of rope settings from the config, the size of a head and the longest sequence of the model."""
EXPERTS = frozenset({"num_local_experts", "num_experts", "moe_intermediate_size"})
"""Keys of mixtures of experts."""
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Architecture:
    """A class of transformers that checkpoints name."""

    name: str
    """Name in ``architectures`` of ``config.json``."""
    model_type: str
    """The ``model_type`` by which transformers chooses the config's class."""
    nested: bool = False
    """True for a model of more than text, whose decoder is described in ``text_config``."""
    flat: bool = False
    """True where the decoder's fields may stand outside of ``text_config`` too, and a head is tied only if the
    config says so in either place.
    """
    untied: bool = False
    """True where a head is tied only if the config says so outside of ``text_config``."""
    also: str | None = None
    """The ``model_type`` of checkpoints that have the same decoder under another name."""


@dataclass(frozen=True)
class Family:
    """Checkpoints that are read in the same way."""

    architectures: tuple[Architecture, ...]
    read: Callable[[HfConfig], ModelConfig]
    """Raises CheckpointInvalid for what the family does not serve."""
    describes: frozenset[str] = frozenset()
    """Keys of a config that would be refused as another geometry, and that ``read`` reads."""
    models: str = ""
    """Names of the models, as people know them; ``docs/reference/models.md`` lists them."""
    blocks: Callable[[], Mapping[type, Callable[..., object]]] | None = None
    """Returns the blocks of layers that no other family has, by the layers' classes: each is called with the
    reader of a layer's weights and the layer. A replica alone asks for them, so they may import torch.
    """


def llama_like(
    config: HfConfig,
    *,
    max_positions: int = 2048,
    tied: bool = False,
    sizes: Mapping[str, int] | None = None,
    rope: ReadRope = read_rope,
) -> ModelConfig:
    """Return a decoder with nothing special; a family replaces what it does otherwise.

    max_positions, tied and sizes are what transformers means where the config does not say; rope returns the
    rotation and the longest sequence that it serves.
    """
    dims = read_dims(config, sizes or {})
    spec, longest = rope(config, dims.head_dim, config.size("max_position_embeddings", max_positions))
    mixer = AttentionLayer(
        AttentionSpec(dims.head_dim**-0.5), spec, dims.num_heads, dims.num_kv_heads, dims.head_dim
    )
    return ModelConfig(
        architecture=config.architecture,
        dims=dims,
        layers=(LayerSpec(mixer, MlpLayer(dims.intermediate)),) * dims.num_layers,
        max_positions=longest,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        dtype=config.text("dtype", config.text("torch_dtype", "")).removeprefix("torch."),
        eos_token_ids=token_ids(config.fields.get("eos_token_id")),
        tied_embeddings=config.flag("tie_word_embeddings", default=tied),
    )


def plain_mlps(model: ModelConfig) -> tuple[LayerSpec, ...]:
    """Return the layers with MLPs that have no gate."""
    mlp = MlpLayer(model.dims.intermediate, gated=False)
    return tuple(replace(layer, mlp=mlp) for layer in model.layers)


def windowed(
    layers: tuple[LayerSpec, ...], config: HfConfig, window: int | None, slides: Callable[[int], bool]
) -> tuple[LayerSpec, ...]:
    """Give a window to the layers that slide: as ``layer_types`` says, else those that slides(index) names."""
    types = layer_types(config, len(layers), slides)
    return tuple(
        layer.attending(window=window) if kind == "sliding_attention" else layer
        for layer, kind in zip(layers, types, strict=True)
    )


def refuse_windows(config: HfConfig, model: ModelConfig) -> None:
    """Refuse the windows of a family that has none.

    transformers computes without them, and drops what is behind one from its cache all the same.
    """
    window = config.integer_or_none("sliding_window", None)
    if window is not None and window < model.max_positions:
        config.require("sliding_window", None)
    if "sliding_attention" in layer_types(config, len(model.layers), lambda _: False):
        config.require("layer_types", None)


def layer_types(config: HfConfig, num_layers: int, slides: Callable[[int], bool]) -> list[str]:
    """Return the type of each layer."""
    types = config.array("layer_types")
    if types is None:
        return [LAYER_TYPES[slides(index)] for index in range(num_layers)]
    if len(types) != num_layers:
        raise CheckpointInvalid(f"config.json: layer_types: expected {num_layers}, found {len(types)}.")
    for kind in types:
        if kind not in LAYER_TYPES:
            raise CheckpointInvalid(
                f"config.json: layer type {kind!r} is not supported; supported: {', '.join(LAYER_TYPES)}."
            )
    return types


def token_ids(value: Any) -> frozenset[int]:
    """Return the ids of ``eos_token_id``: none, one, or a list; raise CheckpointInvalid for something else."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise CheckpointInvalid(f"eos_token_id: expected a token or a list of tokens, found {value!r}.")
    return frozenset(ids)


def labels_of(config: HfConfig) -> tuple[str, ...]:
    """Return the names of the labels that a base's own head scores, in their order.

    Raises:
        CheckpointInvalid: they are not numbered from 0 on, or have no names, or the kind of scores is unknown.
    """
    config.require("problem_type", None, *PROBLEM_TYPES)
    names = config.block("id2label").fields
    count = len(names) or config.size("num_labels", 2)
    labels = names_of_labels(names or {str(number): f"LABEL_{number}" for number in range(count)}, count)
    if labels is None:
        raise CheckpointInvalid(
            f"config.json: id2label: expected a name of at most {MAX_LABEL} characters for each of 0 to "
            f"{count - 1}, found {dict(names)!r}."
        )
    return labels
