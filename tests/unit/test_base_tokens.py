"""Adapters' tokenizers beside the base's, as transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from builder_service.pipeline.base_tokens import BaseTokens
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.faults import Finding
from loramux_shared.sources.files import hash_if_there

WORDS = ("a", "b", "c", "ab")
ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
VOCAB = 8
"""Of the base's config: two ids have rows, and no tokens."""


def tokenizer(kind: str = "BPE") -> PreTrainedTokenizerFast:
    """Return a tokenizer of four pieces and two special tokens."""
    ids = {word: at for at, word in enumerate(WORDS)}
    model = BPE(ids, [("a", "b")]) if kind == "BPE" else Unigram([(word, -1.0) for word in WORDS])
    made = Tokenizer(model)
    made.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, **ENDS)


def files(folder: Path) -> dict[str, FileDigest]:
    """Return what is in a folder."""
    return {path.name: hash_if_there(path) for path in folder.iterdir()}


@pytest.fixture
def compare(tmp_path) -> Callable[[Callable[[PreTrainedTokenizerFast], object], str], tuple[Finding, ...]]:
    """Saves the base's tokenizer, changes it, saves it as an adapter's, and returns what is found in that."""

    def found(change: Callable[[PreTrainedTokenizerFast], object], kind: str = "BPE") -> tuple[Finding, ...]:
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        tokenizer(kind).save_pretrained(base)
        changed = tokenizer(kind)
        change(changed)
        changed.save_pretrained(adapter)
        return BaseTokens(files(base), lambda name: base / name, VOCAB).findings(adapter, files(adapter))

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
    """A tokenizer with the base's tokens is taken without a word, however it was saved again."""
    assert compare(change, kind) == ()


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda made: made.add_tokens(["<tool>"]), "'<tool>' (id 6)"),
        (lambda made: made.add_special_tokens({"pad_token": "<pad>"}), "'<pad>' (id 6)"),
        (lambda made: made.add_tokens([AddedToken(f"<{i}>") for i in range(9)]), "and 4 more"),
    ],
)
def test_new_tokens_are_refused_by_name(compare, kind, change, named):
    """A token that the base does not have is refused, even where the base has a row for its id."""
    found = compare(change, kind)
    assert {finding.code for finding in found} == {"E_EMBED"}
    assert found[0].where == "tokenizer.json"
    assert named.replace("'", "") in found[0].found


def test_another_meaning_of_an_id_is_refused(tmp_path):
    """A token in the place of one of the base's is refused, with both names."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tokenizer().save_pretrained(base)
    adapter.mkdir()
    said = (base / "tokenizer.json").read_text().replace("</s>", "<|im_end|>")
    (adapter / "tokenizer.json").write_text(said)
    (finding,) = BaseTokens(files(base), lambda name: base / name, VOCAB).findings(adapter, files(adapter))
    assert finding.code == "E_EMBED"
    assert finding.found == "<|im_end|> (id 5, which is </s> in the base)"


@pytest.mark.parametrize(
    ("name", "content", "codes"),
    [
        ("added_tokens.json", {"<s>": 4}, []),
        ("added_tokens.json", {"<tool>": 6}, ["E_EMBED"]),
        ("added_tokens.json", {"<s>": 5}, ["E_EMBED"]),
        ("tokenizer_config.json", {"added_tokens_decoder": {"4": {"content": "<s>"}}}, []),
        ("tokenizer_config.json", {"added_tokens_decoder": {"6": {"content": "<tool>"}}}, ["E_EMBED"]),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}, ["E_BAD_TEXT"]),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, ["E_BAD_TEXT"]),
        ("tokenizer.json", {"added_tokens": [{"id": True, "content": "x"}]}, ["E_BAD_TEXT"]),
        ("tokenizer.json", {"model": {"vocab": [[["x"], 0]]}}, ["E_BAD_TEXT"]),
        ("tokenizer.json", {"model": 7}, ["E_BAD_TEXT"]),
    ],
)
def test_every_place_of_added_tokens_is_looked_at(tmp_path, name, content, codes):
    """Older releases write tokens into files of their own; what cannot be read is refused too."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tokenizer().save_pretrained(base)
    adapter.mkdir()
    (adapter / name).write_text(json.dumps(content))
    found = BaseTokens(files(base), lambda name: base / name, VOCAB).findings(adapter, files(adapter))
    assert [finding.code for finding in found] == codes


def test_the_base_s_own_file_is_not_fetched_for_a_copy(tmp_path):
    """Files with the base's digests need no comparison, and adapters with one tokenizer only one."""
    base, adapter, fetched = tmp_path / "base", tmp_path / "adapter", []
    tokenizer().save_pretrained(base)
    changed = tokenizer()
    changed.add_tokens(["<tool>"])
    changed.save_pretrained(adapter)
    tokens = BaseTokens(files(base), lambda name: fetched.append(name) or base / name, VOCAB)
    assert tokens.findings(base, files(base)) == ()
    assert fetched == []
    assert tokens.findings(adapter, files(adapter)) == tokens.findings(adapter, files(adapter)) != ()
    assert sorted(fetched) == sorted(files(base))
