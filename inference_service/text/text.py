"""Between text and tokens: tokenizer, chat template, incremental detokenizing, stop texts."""

from __future__ import annotations

import asyncio
import threading
from codecs import getincrementaldecoder
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from weakref import WeakValueDictionary

from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.decoders import DecodeStream

from inference_service.text.chat_template import ChatTemplate
from inference_service.text.spans import Spans, Wording
from inference_service.text.vocabulary import TokenBytes
from loramux_shared.bundle.added_tokens import OwnTokens
from loramux_shared.faults import CheckpointInvalid, Finding, PromptTooLong, RequestInvalid
from loramux_shared.untrusted_json import parse_json

SLICE_CHARS: Final = 32 * 1024
SHORT_CHARS: Final = 512
"""A text up to here is tokenized at once, in 0.3 ms at most; a thread costs as much as 200 characters."""
END_TOKENS: Final = 32
"""Tokens at the end of a prompt in which a template begins the answer."""
CUT_TOKENS: Final = 256
"""More than a cut was ever seen to add."""


@dataclass(frozen=True)
class Pairs:
    """The form in which a model reads two texts."""

    typed: bool = True
    """Whether the model is told which tokens are of the second text."""
    instruction: str | None = None
    """Where the chat template renders query and document: the system's message before them, empty for none.
    None: the tokenizer joins both."""


class Text:
    """The text side of a model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        vocab: int,
        special_tokens: Mapping[str, str] | None = None,
        pairs: Pairs = Pairs(),
    ) -> None:
        self._tokenizer = tokenizer
        self.pairs = pairs
        self.vocab = vocab
        self._cut = max(CUT_TOKENS, 2 * max(map(len, tokenizer.get_vocab()), default=0))
        self.vocabulary = TokenBytes(tokenizer, vocab)
        self._left_out = dict.fromkeys(self.vocabulary.special, "")
        self.special_tokens = dict(special_tokens or {})
        """Special tokens by their use: ``bos_token`` and the like."""
        self.template = template
        """None: the model has none."""
        self._grown: WeakValueDictionary[bytes, Text] = WeakValueDictionary()
        self._lock = threading.Lock()

    def with_tokens(self, own: OwnTokens) -> Text:
        """Return the text side of a model that has tokens of its own; those with the same ones share it. Raise
        ValueError where the tokenizer gives them other ids.
        """
        key = own.to_bytes()
        with self._lock:
            found = self._grown.get(key)
            if found is None:
                found = self._grown[key] = self._with_tokens(own)
        return found

    def _with_tokens(self, own: OwnTokens) -> Text:
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        for each in own.tokens:
            flags = each.model_dump(exclude={"id", "content"})
            add = tokenizer.add_special_tokens if each.special else tokenizer.add_tokens
            add([AddedToken(each.content, **flags)])
            if (known := tokenizer.token_to_id(each.content)) != each.id:
                raise ValueError(f"id {each.id} for token {each.content!r}, which becomes {known}")
        special = self.special_tokens
        return Text(tokenizer, self.template, own.vocab, special, self.pairs)

    @classmethod
    def load(cls, folder: Path, vocab: int, instruction: str | None = None) -> Text:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja; instruction is as in `Pairs`.

        Raise CheckpointInvalid where there is no tokenizer.json, or a file cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.exists():
            raise CheckpointInvalid("the base checkpoint has no tokenizer.json; save it with a fast tokenizer.")
        try:
            tokenizer = Tokenizer.from_file(str(path))
            config = _read_json(folder / "tokenizer_config.json")
        except Exception as error:  # tokenizers raises plain Exception
            raise CheckpointInvalid(f"the tokenizer's files cannot be read: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        jinja = folder / "chat_template.jinja"
        source = jinja.read_text(encoding="utf-8") if jinja.exists() else template_in(config)
        special = special_tokens(config)
        template = ChatTemplate(source, special) if source else None
        inputs = config.get("model_input_names")  # of transformers; without it, the tokenizer's own types count
        gives_types = not isinstance(inputs, list) or "token_type_ids" in inputs
        return cls(tokenizer, template, vocab, special, Pairs(gives_types, instruction))

    @classmethod
    def from_json(
        cls,
        tokenizer: str,
        template: ChatTemplate | None,
        vocab: int,
        special_tokens: Mapping[str, str],
        pairs: Pairs,
    ) -> Text:
        """Return a text side from what `tokenizer_json` returns."""
        return cls(Tokenizer.from_str(tokenizer), template, vocab, special_tokens, pairs)

    def tokenizer_json(self) -> str:
        """Return the tokenizer as ``tokenizer.json`` has it."""
        return str(self._tokenizer.to_str())

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokenize a text, with the special tokens that the tokenizer adds itself by default.

        Other threads run meanwhile: the library lets go of the interpreter's lock for batches only.
        """
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def encode_prompt(self, text: str, max_seq_len: int, *, add_special_tokens: bool = True) -> list[int]:
        """Tokenize a text that may be longer than what is served, which takes 100 to 400 bytes per token.

        Raises:
            PromptTooLong: it has more tokens than max_seq_len, by so many that its slices show it.
            RequestInvalid: the text holds half a character.
        """
        self._look_at([text], max_seq_len)
        return self.encode(text, add_special_tokens=add_special_tokens)

    def encode_pair(
        self, texts: tuple[str, str], max_seq_len: int, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[int]]:
        """Tokenize two texts as one, as the tokenizer joins pairs; like `encode_prompt` otherwise.

        Beside the tokens are their types, by which a tokenizer may tell the texts apart; all 0 where the model
        is not told.
        """
        self._look_at(texts, max_seq_len)
        [encoding] = self._tokenizer.encode_batch_fast([tuple(texts)], add_special_tokens=add_special_tokens)
        return self._with_types(encoding.ids, encoding.type_ids)

    def encode_shortened(
        self, texts: tuple[str, ...], max_seq_len: int, most: int, side: str, *, add_special_tokens: bool
    ) -> tuple[list[int], list[int]]:
        """Tokenize one or two texts like `encode_pair`, without what is beyond so many tokens on a side."""
        self._look_at(texts, max_seq_len)
        found = encode_shortened(self._tokenizer, texts, most, side, add_special_tokens=add_special_tokens)
        return self._with_types(found.ids, found.type_ids)

    def encode_spans(
        self, text: str, max_seq_len: int, most: int | None, side: str, *, add_special_tokens: bool
    ) -> Spans:
        """Tokenize a text with the characters of each token; it is whole where most is None, else as
        `encode_shortened` has it. Raise what `encode_prompt` does.
        """
        self._look_at([text], max_seq_len)
        if most is None:
            [found] = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        else:
            special = add_special_tokens
            found = encode_shortened(self._tokenizer, (text,), most, side, add_special_tokens=special)
        return Spans(text, found, Wording.of(self._tokenizer, self.special_tokens.get("unk_token")))

    def _with_types(self, tokens: list[int], types: list[int]) -> tuple[list[int], list[int]]:
        return tokens, types if self.pairs.typed else [0] * len(tokens)

    def _look_at(self, texts: Sequence[str], max_seq_len: int) -> None:
        """Look at long texts in slices first.

        Where one was cut, tokens that would have been one can be several, so that `_cut` tokens of each slice
        are not counted; what is, the whole text has too.
        """
        least = 0
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                problem = "the prompt holds a lone surrogate."
                raise RequestInvalid.of_field(problem, "prompt", "text", error.reason) from None
            for start in range(0, len(text), SLICE_CHARS) if len(text) > SLICE_CHARS else ():
                tokens = len(self.encode(text[start : start + SLICE_CHARS], add_special_tokens=False))
                least += max(0, tokens - self._cut)
                if least > max_seq_len:
                    raise PromptTooLong(
                        f"the text has at least {least} tokens, and at most {max_seq_len} are taken. "
                        "Shorten it."
                    )

    def bad_words(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the tokens of these words.

        A word has two spellings, as in vLLM: with a space in front, as within a text, and without.
        """
        bare = [word.lstrip() or word for word in words]
        spelled = list(dict.fromkeys(spelling for word in bare for spelling in (word, f" {word}")))
        encodings = self._tokenizer.encode_batch_fast(spelled, add_special_tokens=False)
        return [
            tuple(encoding.ids) for encoding in encodings if encoding.ids and max(encoding.ids) < self.vocab
        ]

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its own name, or None where there is none."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token; they may be a part of a character."""
        return self.vocabulary.token_bytes(token)

    def token_text(self, token: int) -> str:
        """Return a token as text; a replacement character stands for a part of a character."""
        return self.vocabulary.token_text(token)

    async def encode_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_seq_len: int,
        template: ChatTemplate | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] = MappingProxyType({}),
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Render messages, with the base's template where none is given, and tokenize them.

        Raises:
            PromptTooLong: they have many more tokens than max_seq_len.
            RequestInvalid: there is no chat template, or it refuses the messages.
        """
        rendered = await self._template(template).render(
            messages,
            tools,
            variables,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return await self.encoded(rendered, max_seq_len, add_special_tokens=add_special_tokens)

    async def encode_rendered_pair(
        self,
        texts: tuple[str, str],
        max_seq_len: int,
        template: ChatTemplate | None = None,
        most: int | None = None,
    ) -> list[int]:
        """Render query and document as sentence-transformers does, and tokenize them.

        Where they have more tokens than most, the end of the document is left out.

        Raises:
            PromptTooLong: they have many more tokens than max_seq_len.
            RequestInvalid: there is no chat template, it does not render both, or most leaves no place.
        """
        instruction = self.pairs.instruction
        messages = [{"role": "system", "content": instruction}] if instruction else []
        messages += [{"role": "query", "content": texts[0]}, {"role": "document", "content": texts[1]}]
        rendered = await self._template(template).render(messages, add_generation_prompt=False)
        query, document = (text.strip() for text in texts)
        if query not in rendered or document not in rendered:
            expected = "messages of the roles query and document, as sentence-transformers renders pairs"
            problem = "the chat template does not render both texts."
            raise RequestInvalid.of_field(problem, "messages", expected, "a template that leaves one out")
        tokens = await self.encoded(rendered, max_seq_len, add_special_tokens=False)
        if most is None or len(tokens) <= most:
            return tokens
        before, _, behind = rendered.rpartition(document)
        end = self.encode(behind, add_special_tokens=False)
        if len(self.encode(before, add_special_tokens=False)) + len(end) >= most:
            problem, expected = "the query leaves no place for a document.", "room for query and document"
            raise RequestInvalid.of_field(problem, "truncate_prompt_tokens", expected, str(most))
        return self.encode(before + document, add_special_tokens=False)[: most - len(end)] + end

    def _template(self, template: ChatTemplate | None) -> ChatTemplate:
        """Return a template, or the base's where there is none; raise RequestInvalid without either."""
        template = template or self.template
        if template is None:
            finding = Finding(code="E_NO_TEMPLATE", where="messages", fix="Send text or token_ids.")
            raise RequestInvalid("the base has no chat template.", [finding])
        return template

    async def encoded(self, text: str, max_seq_len: int, *, add_special_tokens: bool) -> list[int]:
        """Tokenize a text as `encode_prompt` does, on another thread unless it is short."""
        if len(text) <= SHORT_CHARS:
            return self.encode_prompt(text, max_seq_len, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(
            self.encode_prompt, text, max_seq_len, add_special_tokens=add_special_tokens
        )

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens; other threads run meanwhile, as in `encode`."""
        [text] = self._tokenizer.decode_batch([list(tokens)], skip_special_tokens=skip_special_tokens)
        return str(text)

    def end_of(self, tokens: Sequence[int]) -> str:
        """Return the end of a prompt as it was rendered, with its special tokens."""
        return self.decode(tokens[-END_TOKENS:], skip_special_tokens=False)

    def detokenizer(
        self, prompt: Sequence[int], *, skip_special_tokens: bool = True, visible: Sequence[str] = ()
    ) -> Detokenizer:
        """Return a detokenizer for the answer to a prompt; special tokens that are shown are never left out."""
        special = self._left_out if skip_special_tokens else {}
        if special and visible:
            special = special | {token: name for name in visible if (token := self.token_id(name)) in special}
        return Detokenizer(self._tokenizer, prompt, special, self.vocabulary.pieces)


class Detokenizer:
    """Tokens in, text out, never half a character.

    Tokens of byte-level vocabularies are bytes, whatever stands around them; a stream decodes others.
    """

    # Tokens of the prompt that decide how the first token of the answer is spaced.
    CONTEXT = 6

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        special: Mapping[int, str],
        pieces: Mapping[int, bytes] | None = None,
    ) -> None:
        """Begin behind a prompt; special tokens have the given texts, and the tokenizer never sees them.

        pieces are the bytes of the tokens of a byte-level vocabulary.
        """
        self._special = special
        context = [token for token in prompt[-self.CONTEXT :] if token not in special]
        if pieces is None:
            stream = DecodeStream(ids=context, skip_special_tokens=False)
            self._decode: Callable[[Sequence[int]], str] = lambda tokens: "".join(
                [stream.step(tokenizer, token) or "" for token in tokens]
            )
        else:
            decoder = getincrementaldecoder("utf-8")("replace")
            self._decode = lambda tokens: decoder.decode(b"".join([pieces[token] for token in tokens]))
            self._decode(context)

    def push(self, tokens: Sequence[int]) -> str:
        """Return the text that became certain with these tokens; often, but not always, their own."""
        special, decode = self._special, self._decode
        if special.keys().isdisjoint(tokens):
            return decode(tokens)
        return "".join([special[token] if token in special else decode((token,)) for token in tokens])


class StopTexts:
    """Finds the first stop text, and holds back what may become one."""

    def __init__(self, stops: Sequence[str], *, keep: bool = False) -> None:
        """Look for stops; keep: the one that is found is shown too."""
        self.keep = keep
        self.texts = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Return the text that is safe to show; after a stop text was found, nothing more."""
        if self.found is not None:
            return ""
        self._held += text
        hits = [(self._held.find(stop), stop) for stop in self.texts if stop in self._held]
        if hits:
            at, self.found = min(hits)
            text, self._held = self._held[: at + len(self.found) * self.keep], ""
            return text
        keep = max((self._overlap(stop) for stop in self.texts), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def flush(self) -> str:
        """Return what is still held, at the end of the answer."""
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """Characters at the end of the held text that begin the stop text."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens of a ``tokenizer_config.json`` by what they are for."""
    return {
        key: value if isinstance(value, str) else str(value.get("content", ""))
        for key, value in config.items()
        if key.endswith("_token") and isinstance(value, str | dict)
    }


def template_in(config: Mapping[str, Any]) -> str:
    """Return the chat template of a ``tokenizer_config.json``; empty where it has none."""
    template = config.get("chat_template") or ""
    if isinstance(template, list):  # named templates
        named = {item["name"]: item["template"] for item in template}
        template = named.get("default", "")
    return str(template)


def _read_json(path: Path) -> dict[str, Any]:
    return dict(parse_json(path.read_bytes())) if path.exists() else {}


def encode_shortened(
    tokenizer: Tokenizer, texts: tuple[str, ...], most: int, side: str, *, add_special_tokens: bool
) -> Encoding:
    """Return one or two texts as tokens, so many at most with the special ones.

    The rest of each is left out on a side, left or right, as transformers truncates them.
    """
    parts = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    special = tokenizer.num_special_tokens_to_add(len(parts) > 1) if add_special_tokens else 0
    for part, length in zip(parts, shortened([*map(len, parts)], max(0, most - special)), strict=True):
        part.truncate(length, direction=side)
    pair = parts[1] if len(parts) > 1 else None
    return tokenizer.post_process(parts[0], pair, add_special_tokens)


def shortened(lengths: list[int], most: int) -> list[int]:
    """Return the lengths that texts have when the longer one is cut first until both have so many tokens."""
    if len(lengths) == 1:
        return [min(lengths[0], most)]
    short, long = sorted(lengths)
    if short + long > most:
        short = min(short, most // 2)
        long = most - short
    return [short, long] if lengths[0] <= lengths[1] else [long, short]
