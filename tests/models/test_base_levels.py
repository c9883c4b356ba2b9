"""A model with images says things about its decoder at two levels; each counts as in transformers."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Gemma3Config

from loramux_shared.bases.read import read_config
from tests.models.test_families import PARTS
from tests.support.tiny import SIZES, VOCAB, World, make_checkpoint, oracle, oracle_tokens, run_engine

ABSENT = object()
PROMPT = list(range(3, 43))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Gemma 3 with images, and an untied head in the file."""
    folder = tmp_path_factory.mktemp("images") / "base"
    config = Gemma3Config(
        text_config=SIZES | PARTS["gemma"] | {"layer_types": ["full_attention", *["sliding_attention"] * 2]},
        vision_config=PARTS["vision"],
        mm_tokens_per_image=4,
        image_token_index=VOCAB - 1,
        eos_token_id=2,
    )
    make_checkpoint(folder, config)
    tensors = load_file(folder / "model.safetensors")
    embedding = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    head = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(5)) * 0.3
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json.first").write_bytes((folder / "config.json").read_bytes())
    return folder


def say(folder: Path, key: str, outside: Any, inside: Any) -> None:
    """Write the first config with a key at both levels, or not at all."""
    config = json.loads((folder / "config.json.first").read_text())
    for block, value in ((config, outside), (config["text_config"], inside)):
        block.pop(key, None)
        if value is not ABSENT:
            block[key] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("outside", "inside"), [*itertools.product((True, False, None, ABSENT), (True, False, ABSENT))]
)
def test_whether_the_head_is_tied_stands_outside(images: Path, outside: Any, inside: Any) -> None:
    """The value in the decoder's own block is not read, as transformers does not read it."""
    say(images, "tie_word_embeddings", outside, inside)
    assert read_config(images).tied_embeddings is bool(AutoConfig.from_pretrained(images).tie_word_embeddings)


def test_a_head_of_its_own_answers(images: Path) -> None:
    """An untied model with images uses its head, though the decoder's config says tied."""
    say(images, "tie_word_embeddings", outside=False, inside=True)
    expected = oracle_tokens(oracle(images, None), PROMPT, 16)
    world = World(images, {}, images.parent)
    assert run_engine(world.load(world.built()), [("base", PROMPT)], 16) == [expected]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("outside", "inside", "generation"),
    [
        (7, 8, ABSENT),
        (ABSENT, 8, ABSENT),
        (None, [8, 9], ABSENT),
        (7, ABSENT, ABSENT),
        (7, 8, 9),
        (7, 8, [9, 5]),
    ],
)
def test_sequences_end_where_transformers_ends_them(
    images: Path, outside: Any, inside: Any, generation: Any
) -> None:
    """The end token is generation_config.json's, else the outer config's, else the decoder block's."""
    say(images, "eos_token_id", outside, inside)
    file = images / "generation_config.json"
    file.unlink(missing_ok=True)
    if generation is not ABSENT:
        file.write_text(json.dumps({"eos_token_id": generation}))
    ends = oracle(images, None).generation_config.eos_token_id
    assert read_config(images).eos_token_ids == set(ends if isinstance(ends, list) else [ends])


@pytest.mark.parametrize(
    ("outside", "inside"),
    [("bfloat16", "float16"), (ABSENT, "float16"), ("float32", ABSENT), (None, "bfloat16")],
)
def test_the_type_of_the_weights_stands_outside_first(images: Path, outside: Any, inside: Any) -> None:
    """The decoder's type of the weights counts only where the outer config has none."""
    say(images, "dtype", outside, inside)
    found = AutoConfig.from_pretrained(images)
    assert read_config(images).dtype == str(found.dtype or found.text_config.dtype).removeprefix("torch.")
