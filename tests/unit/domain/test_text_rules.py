"""Chat template, sampling defaults and stop tokens that an adapter brings: the builder's rules."""

import json
from typing import Any

import pytest

from builder_service.domain.rules.texts import (
    GENERATION,
    MAX_BYTES,
    TEMPLATE,
    TOKENIZER,
    check_texts,
    too_large,
)


def found(name: str, content: Any) -> list[tuple[str, str]]:
    """Return codes and places of the findings in a file."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return [(finding.code, finding.where) for finding in check_texts({name: data}, vocab=100)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (TEMPLATE, b"{{ anything }} {% is the serving side's business"),
        (
            GENERATION,
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "eos_token_id": [2, 99]},
        ),
        (GENERATION, {"eos_token_id": 2, "top_k": None, "max_new_tokens": 9, "transformers_version": "5"}),
        (TOKENIZER, {"chat_template": "x", "bos_token": {"content": "<s>"}, "eos_token": "</s>", "n": [1]}),
        (TOKENIZER, {"chat_template": [{"name": "default", "template": "x"}], "add_bos_token": True}),
    ],
)
def test_what_trainers_write_is_accepted(name: str, content: Any) -> None:
    assert found(name, content) == []


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        (TEMPLATE, b"\xff\xfe", ""),
        (GENERATION, b"{", ""),
        (GENERATION, [1], ""),
        (GENERATION, b'{"top_k": 1, "top_k": 2}', ""),
        (GENERATION, {"do_sample": 1}, "do_sample"),
        (GENERATION, {"temperature": -1}, "temperature"),
        (GENERATION, {"temperature": True}, "temperature"),
        (GENERATION, {"top_p": 0}, "top_p"),
        (GENERATION, {"top_k": 1.5}, "top_k"),
        (GENERATION, {"eos_token_id": 100}, "eos_token_id"),
        (GENERATION, {"eos_token_id": ["2"]}, "eos_token_id"),
        (TOKENIZER, b"null", ""),
        (TOKENIZER, {"chat_template": {"default": "x"}}, "chat_template"),
        (TOKENIZER, {"chat_template": [{"name": "default"}]}, "chat_template"),
        (TOKENIZER, {"eos_token": {"id": 2}}, "eos_token"),
    ],
)
def test_what_cannot_be_used_refuses_the_adapter(name: str, content: Any, field: str) -> None:
    """A broken file is refused with its name and field: serving with the base's instead would be a guess."""
    assert found(name, content) == [("E_BAD_TEXT", f"{name}: {field}" if field else name)]


def test_size_is_looked_at_before_anything_is_fetched() -> None:
    sizes = dict.fromkeys((TEMPLATE, GENERATION, TOKENIZER, "other.bin"), 1 << 30) | {GENERATION: 10}
    assert [finding.where for finding in too_large(sizes)] == [TEMPLATE, TOKENIZER]
    assert too_large(dict(MAX_BYTES)) == []


def test_what_a_file_says_is_not_repeated_at_length() -> None:
    """Thousands of bad fields, and fields with names of a kilobyte, make few findings and short ones."""
    tokens = {TOKENIZER: json.dumps({f"{i}_{'x' * 1000}_token": i for i in range(1000)}).encode()}
    unused = {GENERATION: json.dumps({f"{i}_{'x' * 1000}": i for i in range(30)}).encode()}
    findings = [*check_texts(tokens, vocab=100), *check_texts(unused, vocab=100)]
    assert len(findings) == 33
    assert max(len(str(finding)) for finding in findings) < 1200
