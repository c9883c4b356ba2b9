"""What the bodies of requests for tokens, and for the text of tokens, may hold."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from inference_service.http.openai.chat_schema import Messages, Tool
from inference_service.http.openai.schema_rules import GOES_ON, OF_MESSAGES, ONE_OF_TWO
from inference_service.http.wire.body import Body, Examples
from inference_service.http.wire.fields import Made


class TokenizeBody(Body):
    """``POST /tokenize``: a prompt, or messages."""

    model_config = ConfigDict(json_schema_extra=ONE_OF_TWO | GOES_ON)
    examples: ClassVar[Examples] = {
        "prompt": {"prompt": "The party of the first part"},
        "messages": {"messages": [{"role": "user", "content": "Hello"}], "return_token_strs": True},
    }

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Made[tuple[Tool, ...] | None] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    """With those that the tokenizer adds itself; when not set, true of a prompt and false of messages."""
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "either prompt or messages")
        if self.prompt is not None and any(getattr(self, name) is not None for name in OF_MESSAGES):
            raise PydanticCustomError("prompt", f"{', '.join(OF_MESSAGES)} only beside messages")
        return self


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    examples: ClassVar[Examples] = {"tokens": {"tokens": [5, 6, 7]}}

    model: str | None = None
    tokens: tuple[Annotated[int, Field(json_schema_extra={"minimum": 0})], ...]
