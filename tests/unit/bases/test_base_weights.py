"""A base's weights: the files that are served, their protection against changes, one answer for all."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from transformers import Gemma2Config, LlamaConfig

from builder_service.pipeline.build import build
from builder_service.pipeline.check import check_one
from builder_service.pipeline.progress import Progress
from inference_service.engine.models.checkpoint import Checkpoint
from inference_service.engine.models.shard import ShardInvalid, read_shard
from loramux_shared.bases.families import load_families
from loramux_shared.bases.read import read_config, read_fields
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.faults import BundleCorrupt, CheckpointInvalid
from loramux_shared.sources.checkpoint import PlacedBase
from loramux_shared.storage.memory import MemoryStore
from loramux_shared.storage.open import open_store
from tests.support.adapters import write_adapter, write_base
from tests.support.cases import cases
from tests.support.examples import examples
from tests.support.folders import context_of, deployment_of
from tests.support.hub_configs import HUB_CONFIGS
from tests.support.processes.forks import Forked
from tests.support.tiny import SIZES, World, make_checkpoint, oracle, oracle_tokens, run_engine
from tests.unit.bases.overwritten_base import TOKENS, WAYS, answers_while_its_file_changes

EMBEDDING, HEAD, WEIGHTS = "model.embed_tokens.weight", "lm_head.weight", "model.safetensors"
PROMPT = list(range(3, 40))
GEMMA2 = {"head_dim": 16, "final_logit_softcapping": None}
TIED = {
    "llama": LlamaConfig(**SIZES | {"tie_word_embeddings": True}),
    "gemma2": Gemma2Config(**SIZES | GEMMA2 | {"tie_word_embeddings": True}),
}


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS, metadata={"format": "pt"})


def other_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    drawn = torch.randn(tensors[EMBEDDING].shape, generator=torch.Generator().manual_seed(1))
    return tensors | {HEAD: drawn * 0.3}


def one_row(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    head = tensors[EMBEDDING].clone()
    head[3, 0] += 5
    return tensors | {HEAD: head}


def same_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {HEAD: tensors[EMBEDDING].clone()}


def head_alone(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tied weights under the head's name alone."""
    return {HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()}


def without_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "change", "warned"),
    [
        ("llama", other_head, True),
        ("gemma2", other_head, True),
        ("llama", one_row, True),
        ("llama", same_head, False),
        ("gemma2", head_alone, False),
        ("llama", without_prefix, False),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_of_a_tied_model_what_is_in_the_file_counts(
    tmp_path: Path, family: str, change: Any, warned: bool
) -> None:
    """A head that differs from the embeddings answers, with a warning; the rest as in transformers."""
    world, store = World(tmp_path / "base", {}, tmp_path), MemoryStore()
    make_checkpoint(world.base, TIED[family])
    rewrite(world.base, change)
    expected = oracle_tokens(oracle(world.base, None), PROMPT, 12)
    world.build(store)
    with capture_logs() as logs:
        ready = world.load(store)
    assert run_engine(ready, [("base", PROMPT)], 12) == [expected]
    assert ready.service.local.catalog.get("base").warnings == (("W_HEAD",) if warned else ())
    assert [line.get("code") for line in logs if line["log_level"] == "warning"] == ["W_HEAD"] * warned


def test_a_running_model_does_not_feel_its_file(tmp_path: Path) -> None:
    """Overwritten in place and then cut off, the file changes no answer and ends no process."""
    world = World(tmp_path / "base", {}, tmp_path)
    make_checkpoint(world.base, LlamaConfig(**SIZES | {"hidden_size": 96}), torch.float16)
    world.build(open_store(f"file://{tmp_path}/store"))
    assert Forked(answers_while_its_file_changes, tmp_path, PROMPT).wait() == 0
    first, overwritten, cut = json.loads((tmp_path / "answers.json").read_text())
    assert len(first) == TOKENS * len(WAYS)
    assert first == overwritten == cut


def zeroed(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-400] + bytes(400))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def taken_away(path: Path) -> None:
    """Remove a file as another replica does, which found it damaged and fetches it again."""
    path.unlink()


def _placed(folder: Path) -> tuple[World, MemoryStore, PlacedBase]:
    """A base alone, built, and where its files are."""
    world, store = World(folder / "base", {}, folder), MemoryStore()
    make_checkpoint(world.base, TIED["llama"])
    world.build(store)
    generation = current_generation(store, "tiny")
    assert generation is not None
    return world, store, PlacedBase(generation.base, world.base, folder / "cache")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (WEIGHTS, zeroed),
        (WEIGHTS, cut_off),
        (WEIGHTS, taken_away),
        ("config.json", zeroed),
        ("tokenizer.json", taken_away),
    ],
)
def test_what_is_read_is_verified(tmp_path: Path, name: str, change: Any) -> None:
    """A file that changed after the build, even after it was looked at, is refused when it is read."""
    world, store, placed = _placed(tmp_path)
    checkpoint = Checkpoint(placed.folder, torch.float32, torch.device("cpu"), placed.require)
    change(world.base / name)
    with pytest.raises(BundleCorrupt, match=rf"{name}: expected sha256 \w+ \(\d+ bytes\), found"):  # noqa: PT012
        with placed.small_files():
            pass
        checkpoint.get("model.norm.weight", (SIZES["hidden_size"],))
    with pytest.raises(BundleCorrupt, match=rf"{name}: expected sha256"):
        world.load(store)


def test_files_that_are_none(tmp_path: Path) -> None:
    """A file is read to its end, or refused with the error in it."""
    for data, reported in (
        (b"", "it ends after 0 bytes"),
        (b"\xff" * 8, "a header of"),
        (b"\x03\0\0\0\0\0\0\0[1]", "no table of tensors"),
    ):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(ShardInvalid, match=reported):
            read_shard(tmp_path / "a")
    (tmp_path / "a").write_bytes(tail := b"\x02\0\0\0\0\0\0\0{}tail")
    assert read_shard(tmp_path / "a").digest.size == len(tail)


@pytest.mark.parametrize("entry", cases(__file__, "test_headers_that_lie"))
def test_headers_that_lie(tmp_path: Path, entry: dict[str, Any]) -> None:
    """A header that does not describe its file is refused, and nothing of its size is reserved before."""
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ShardInvalid):
        read_shard(tmp_path / "a")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ('{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,1e999]}}', "no table of tensors"),
        ('{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,8]}}', "no table of tensors"),
        (
            '{"a":{"dtype":"U8","shape":[0,9223372036854775808],"data_offsets":[0,0]}}',
            "2 sizes that no tensor has",
        ),
        (
            f'{{"a":{{"dtype":"U8","shape":[{"1," * 99}8],"data_offsets":[0,8]}}}}',
            "100 sizes that no tensor has",
        ),
        ('{"\\ud800":{"dtype":"U8","shape":[9],"data_offsets":[0,8]}}', "no table of tensors"),
        (f'{{"{"a" * 9999}":{{"dtype":"U8","shape":[9],"data_offsets":[0,8]}}}}', r"aaa\.\.\. has 8 bytes"),
        ('{"a":0,"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}', "no table of tensors"),
    ],
    ids=[
        "endless",
        "an endless size",
        "64 bits",
        "dimensions",
        "half a character",
        "a long name",
        "a name twice",
    ],
)
def test_headers_that_overflow(tmp_path: Path, header: str, expected: str) -> None:
    """Numbers beyond 64 bits, names that are no text and endless names are refused in few words."""
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(ShardInvalid, match=expected) as caught:
        read_shard(tmp_path / "a")
    assert len(str(caught.value).encode()) < 400


REFUSED: dict[str, dict[str, Any]] = cases(__file__, "REFUSED")


@pytest.mark.parametrize("name", REFUSED)
def test_builder_and_replica_refuse_a_base_with_the_same_words(tmp_path: Path, name: str) -> None:
    """A check, a build and the start of a replica ask one reader; the weights are not even looked at."""
    write_base(tmp_path / "base", **{"original_max_position_embeddings": 32, **REFUSED[name]})
    (tmp_path / "base" / "model.safetensors").unlink()
    write_adapter(tmp_path / "one")
    with pytest.raises(CheckpointInvalid) as refused:
        read_config(tmp_path / "base", 48)
    wish, context = deployment_of(tmp_path, "one", max_seq_len=48), context_of(tmp_path)
    with pytest.raises(CheckpointInvalid) as checked:
        check_one(wish, context, Progress(["one"]))
    with pytest.raises(CheckpointInvalid) as built:
        build(wish, context, Progress(["one"]))
    assert checked.value.message == refused.value.message
    assert built.value.message == f"base checkpoint: {refused.value.message}"
    assert list(context.store.list("")) == []


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from([0, 1, -1, 7, 1 << 31, 10**400, 0.0, -0.5, 1e-320, float("inf"), float("nan")]),
        st.sampled_from(["", "yarn", "longrope", "full_attention", "float32", "\ud800"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["rope_type", "factor", "full_attention", "short_factor", "rope_theta"]), inner
        ),
    ),
    max_leaves=4,
)
KEYS = sorted({key for config in HUB_CONFIGS.values() for key in (*config, *(config.get("text_config") or ()))})
MORE = ("rope_parameters", "layer_types", "quantization_config", "dtype", "per_layer_config", "attention_bias")


@settings(max_examples=examples(80), derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    base=st.sampled_from(sorted(HUB_CONFIGS)),
    change=st.dictionaries(st.sampled_from([*KEYS, *MORE]), VALUES, max_size=3),
    inside=st.dictionaries(st.sampled_from([*KEYS, *MORE]), VALUES, max_size=2),
    generation=st.dictionaries(st.just("eos_token_id"), VALUES),
    longest=st.sampled_from([None, 1, 10**9]),
)
def test_no_config_is_worse_than_refused(base: str, change, inside, generation, longest: int | None) -> None:
    """Any value under any key is read or refused by name; nothing else is raised, and nothing takes long."""
    config = HUB_CONFIGS[base] | change
    if isinstance(config.get("text_config"), dict):
        config = config | {"text_config": config["text_config"] | inside}
    with suppress(CheckpointInvalid):
        assert read_fields(config, generation, longest).architecture in load_families()
