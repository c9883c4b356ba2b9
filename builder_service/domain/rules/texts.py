"""Texts that an adapter may bring beside its weights: chat template, sampling defaults, stop tokens."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from loramux_shared.bundle.manifest import TEXT_FILES
from loramux_shared.faults import Finding
from loramux_shared.runtime import MAX_TEMPERATURE
from loramux_shared.untrusted_json import JsonInvalid, excerpt, parse_strict_json
from loramux_shared.wording import listed

TEMPLATE, GENERATION, TOKENIZER = TEXT_FILES
MAX_BYTES: Final = {
    TEMPLATE: 1 << 20,
    GENERATION: 64 << 10,
    TOKENIZER: 8 << 20,
    "tokenizer.json": 64 << 20,
    "added_tokens.json": 4 << 20,
    "config.json": 4 << 20,
}
"""The largest tokenizer_config.json that was seen, with thousands of added tokens, has 1.2e6; the largest
tokenizer.json, of 262,144 tokens, 3.4e7."""

MAX_FINDINGS: Final = 32
"""About one file."""

# Fields of generation_config.json that say nothing about how a token is chosen, or that every request says.
_SILENT: Final = frozenset({
    "_from_model_config", "bos_token_id", "cache_implementation", "decoder_start_token_id", "max_length",
    "max_new_tokens", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id",
    "return_dict_in_generate", "transformers_version", "trust_remote_code", "use_cache",
})  # fmt: skip


def too_large(sizes: Mapping[str, int]) -> list[Finding]:
    """Return a finding for each text file that is larger than it may be; other files are not looked at."""
    return [
        bad_text(name, "", f"at most {limit} bytes", f"{sizes[name]} bytes")
        for name, limit in MAX_BYTES.items()
        if sizes.get(name, 0) > limit
    ]


def check_texts(files: Mapping[str, bytes], vocab: int) -> list[Finding]:
    """Return what is wrong with text files by their names, and which of their fields are not used."""
    found = []
    for name, data in sorted(files.items()):
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            found.append(bad_text(name, "", "UTF-8 text", f"byte {error.start} is not"))
            continue
        if name != TEMPLATE:
            found += _check_json(name, data, vocab)
    return found


def _check_json(name: str, data: bytes, vocab: int) -> list[Finding]:
    try:
        fields = parse_strict_json(data)
    except JsonInvalid as error:
        return [bad_text(name, "", "a JSON object", f"invalid JSON ({error})")]
    if not isinstance(fields, dict):
        return [bad_text(name, "", "a JSON object", excerpt(fields))]
    return _check_generation(fields, vocab) if name == GENERATION else _check_tokenizer(fields)


def _check_generation(fields: dict[str, Any], vocab: int) -> list[Finding]:
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "do_sample": (lambda value: isinstance(value, bool), "true or false"),
        "temperature": (
            lambda value: _number(value) and 0 <= value <= MAX_TEMPERATURE,
            f"0 to {MAX_TEMPERATURE:g}",
        ),
        "top_p": (lambda value: _number(value) and 0 < value <= 1, "above 0, at most 1"),
        "top_k": (lambda value: type(value) is int and value >= 0, "0 or more"),
        "eos_token_id": (lambda value: _ids(value, vocab), f"ids from 0 to {vocab - 1}"),
    }
    found = [
        bad_text(GENERATION, key, expected, excerpt(fields[key]))
        for key, (fits, expected) in rules.items()
        if fields.get(key) is not None and not fits(fields[key])
    ]
    unused = sorted(key for key in fields if fields[key] is not None and key not in {*rules, *_SILENT})
    if unused:
        used, others = f"used are {', '.join(rules)}", listed([*map(excerpt, unused)], 8)
        found.append(Finding(code="W_GENERATION", where=GENERATION, expected=used, found=others))
    return found


def _check_tokenizer(fields: dict[str, Any]) -> list[Finding]:
    """Look at the fields that are used; the others are for tokenizers, which adapters share with the base."""
    found = []
    template = fields.get("chat_template")
    if not (template is None or isinstance(template, str) or _named_templates(template)):
        found.append(
            bad_text(TOKENIZER, "chat_template", "a template, or a list of named ones", excerpt(template))
        )
    for key, value in sorted(fields.items()):
        if not key.endswith("_token") or isinstance(value, str | bool) or value is None:
            continue
        if not isinstance(value, dict) or not isinstance(value.get("content"), str):
            found.append(bad_text(TOKENIZER, excerpt(key), "a token", excerpt(value)))
    return found[:MAX_FINDINGS]


def _named_templates(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str)
        for item in value
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ids(value: Any, vocab: int) -> bool:
    ids = value if isinstance(value, list) else [value]
    return len(ids) <= 64 and all(type(item) is int and 0 <= item < vocab for item in ids)


def bad_text(name: str, field: str, expected: str, found: str) -> Finding:
    """Return the finding about a file beside an adapter."""
    where = f"{name}: {field}" if field else name
    fix = "Correct the file, or remove it: the base's is used then."
    return Finding(code="E_BAD_TEXT", where=where, expected=expected, found=found, fix=fix)
