"""Defaults that an adapter brings beside its weights: its chat template, sampling, stop and own tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from inference_service.text.chat_template import ChatTemplate
from inference_service.text.text import Text, special_tokens, template_in
from loramux_shared.bundle.added_tokens import OwnTokens
from loramux_shared.bundle.manifest import OWN_TOKENS_FILE, TEXT_FILES
from loramux_shared.faults import AdapterInvalid, CheckpointInvalid, Finding

TEMPLATE, GENERATION, TOKENIZER = TEXT_FILES


@dataclass(frozen=True)
class AdapterDefaults:
    """The defaults of an adapter, which come before the base's where a request leaves something open."""

    template: ChatTemplate | None = None
    """None: the base's."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    """Stop tokens beside the base's."""
    text: Text | None = None
    """Tokenizer, where it has other tokens than the base; None: the base's."""


NO_DEFAULTS: Final = AdapterDefaults()


def read_adapter_defaults(name: str, texts: Mapping[str, bytes], base: Text) -> AdapterDefaults:
    """Read the text files of an adapter's bundle.

    Raises:
        AdapterInvalid: a file cannot be read, or the template cannot be parsed.
        BundleCorrupt: its own tokens are of a format that is not known.
    """
    if not texts:
        return NO_DEFAULTS
    generation, tokenizer = (_fields(name, file, texts) for file in (GENERATION, TOKENIZER))
    special = base.special_tokens | special_tokens(tokenizer)
    text = _text(name, texts, base)
    sampled = generation.get("do_sample") is True  # transformers' default: otherwise greedy
    return AdapterDefaults(
        template=_template(name, texts, tokenizer, special),
        temperature=_or(generation.get("temperature"), 1.0) if sampled else None,
        top_p=generation.get("top_p") if sampled else None,
        top_k=generation.get("top_k") if sampled else None,
        stop_token_ids=_eos(generation, tokenizer, text or base),
        text=text,
    )


def _text(name: str, texts: Mapping[str, bytes], base: Text) -> Text | None:
    if OWN_TOKENS_FILE not in texts:
        return None
    try:
        return base.with_tokens(OwnTokens.from_bytes(texts[OWN_TOKENS_FILE], what=OWN_TOKENS_FILE))
    except ValueError as error:
        raise _refused(name, OWN_TOKENS_FILE, "tokens that can be added to the base's", str(error)) from error


def _template(
    name: str, texts: Mapping[str, bytes], tokenizer: Mapping[str, Any], special: Mapping[str, str]
) -> ChatTemplate | None:
    file = TEMPLATE if TEMPLATE in texts else TOKENIZER
    try:
        source = texts[TEMPLATE].decode() if TEMPLATE in texts else template_in(tokenizer)
        return ChatTemplate(source, special) if source else None
    except (CheckpointInvalid, ValueError) as error:
        raise _refused(name, file, "a chat template", str(error)) from error


def _eos(generation: Mapping[str, Any], tokenizer: Mapping[str, Any], base: Text) -> frozenset[int]:
    """Return the ends that the adapter was trained to write."""
    value = generation.get("eos_token_id")
    ids = set(value if isinstance(value, list) else [] if value is None else [value])
    token = special_tokens(tokenizer).get("eos_token")
    if token and (number := base.token_id(token)) is not None:
        ids.add(number)
    return frozenset(ids)


def _fields(name: str, file: str, texts: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        fields = json.loads(texts.get(file, b"{}"))
    except ValueError as error:
        raise _refused(name, file, "JSON", str(error)) from error
    if not isinstance(fields, dict):
        raise _refused(name, file, "an object", type(fields).__name__)
    return fields


def _refused(name: str, file: str, expected: str, found: str) -> AdapterInvalid:
    fix = "Correct or remove the file in the adapter's repository, and build again."
    finding = Finding(
        code="E_BAD_TEXT", adapter=name, where=file, expected=expected, found=found[:200], fix=fix
    )
    return AdapterInvalid(f"adapter {name!r} brings a {file} that cannot be used", [finding])


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
