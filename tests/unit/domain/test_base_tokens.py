"""Adapters' tokenizers beside the base's, as transformers saves them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from builder_service.domain.rules.checked import ComparedTokens
from builder_service.domain.tokens import FLAGS
from builder_service.pipeline.base_tokens import BaseTokens
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.sources.files import hash_if_there
from tests.support.cases import cases

WORDS = ("a", "b", "c", "ab")
ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
VOCAB = 8
"""Vocabulary of the base's config: two ids have rows, and no tokens."""


def tokenizer(kind: str = "BPE") -> PreTrainedTokenizerFast:
    """Return a tokenizer of four pieces and two special tokens."""
    ids = {word: at for at, word in enumerate(WORDS)}
    model = BPE(ids, [("a", "b")]) if kind == "BPE" else Unigram([(word, -1.0) for word in WORDS])
    made = Tokenizer(model)
    made.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, **ENDS)


def files(folder: Path) -> dict[str, FileDigest]:
    return {path.name: hash_if_there(path) for path in folder.iterdir()}


def compared(base: Path, adapter: Path) -> ComparedTokens:
    return BaseTokens(files(base), lambda name: base / name, VOCAB).compare(adapter, files(adapter))


def folders(path: Path) -> tuple[Path, Path]:
    """Make a folder with the base's tokenizer, and an empty one for an adapter's."""
    base, adapter = path / "base", path / "adapter"
    tokenizer().save_pretrained(base)
    adapter.mkdir()
    return base, adapter


@pytest.fixture
def compare(tmp_path) -> Callable[[Callable[[PreTrainedTokenizerFast], object], str], ComparedTokens]:
    """Saves the base's tokenizer, changes the copy, saves it as an adapter's, and returns the comparison."""

    def found(change: Callable[[PreTrainedTokenizerFast], object], kind: str = "BPE") -> ComparedTokens:
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        tokenizer(kind).save_pretrained(base)
        changed = tokenizer(kind)
        change(changed)
        changed.save_pretrained(adapter)
        return compared(base, adapter)

    return found


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
@pytest.mark.parametrize(
    "change",
    [
        lambda made: made,
        lambda made: setattr(made, "chat_template", "{{ messages }}"),
        lambda made: setattr(made, "padding_side", "left"),
        lambda made: setattr(made, "pad_token", "</s>"),
        lambda made: made.backend_tokenizer.enable_truncation(512),
    ],
)
def test_copies_of_the_base_s_tokenizer_pass(compare, kind, change):
    """A tokenizer with other templates, padding or truncation has the base's tokens."""
    assert compare(change, kind) == ComparedTokens()


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
@pytest.mark.parametrize(
    ("change", "added"),
    [
        (lambda made: made.add_tokens(["<tool>"]), {"<tool>": 6}),
        (lambda made: made.add_special_tokens({"pad_token": "<pad>"}), {"<pad>": 6}),
        (lambda made: made.add_tokens([f"<{i}>" for i in range(9)]), {f"<{i}>": 6 + i for i in range(9)}),
    ],
)
def test_new_tokens_behind_the_base_s_are_taken(compare, kind, change, added):
    """Added tokens have the ids of transformers, whether or not the base has unused rows for them."""
    found = compare(change, kind)
    assert found.findings == ()
    assert {token.content: token.id for token in found.added} == added


@pytest.mark.parametrize(
    ("added", "named"),
    [
        *cases(__file__, "test_tokens_that_cannot_be_added_so_are_refused"),
        ([{"id": 6, "content": "x" * 257}], f"{'x' * 40} (id 6)"),
        ([{"id": 6 + i, "content": f"<{i}>"} for i in range(4097)], "and 4092 more"),
    ],
)
def test_tokens_that_cannot_be_added_so_are_refused(tmp_path, added, named):
    """Ids with holes or repeats, texts without bounds, invalid flags and too many tokens are refused."""
    base, adapter = folders(tmp_path)
    flags = dict.fromkeys(FLAGS, False)
    (adapter / "tokenizer.json").write_text(json.dumps({"added_tokens": [flags | each for each in added]}))
    found = compared(base, adapter)
    assert (found.added, [each.code for each in found.findings]) == ((), ["E_EMBED"])
    assert named in found.findings[0].found


def test_another_meaning_of_an_id_is_refused(tmp_path):
    """A token whose id is another token's in the base is refused with both."""
    base, adapter = folders(tmp_path)
    output = (base / "tokenizer.json").read_text().replace("</s>", "<|im_end|>")
    (adapter / "tokenizer.json").write_text(output)
    (finding,) = compared(base, adapter).findings
    assert finding.code == "E_EMBED"
    assert finding.found == "<|im_end|> (id 5, which is </s> in the base)"


@pytest.mark.parametrize(
    ("name", "content", "codes"),
    [
        *cases(__file__, "test_every_place_of_added_tokens_is_looked_at"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}, ["E_BAD_TEXT"]),
    ],
)
def test_every_place_of_added_tokens_is_looked_at(tmp_path, name, content, codes):
    """Older releases write tokens into separate files; an unreadable file is refused too."""
    base, adapter = folders(tmp_path)
    (adapter / name).write_text(json.dumps(content))
    assert [finding.code for finding in compared(base, adapter).findings] == codes
