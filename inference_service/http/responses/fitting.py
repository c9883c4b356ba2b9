"""Conversations that are longer than what is served: ``truncation: "auto"``."""

from __future__ import annotations

from collections.abc import Mapping

from inference_service.http.openai.chat_schema import ChatBody
from inference_service.http.openai.conversation import Conversation
from inference_service.serving.service import GenerationService
from loramux_shared.faults import PromptTooLong


async def fitted(service: GenerationService, chat: ChatBody, headers: Mapping[str, str]) -> ChatBody:
    """Return a chat that leaves its answer room: without as many of the first turns as it takes, and no more.

    A turn begins where the user speaks; system messages before the first one stay. Of a conversation whose last
    turn is too long, that is returned.

    Raises:
        Fault: the chat cannot be counted, for another reason than its length.
    """
    if await _fits(service, chat, headers):
        return chat
    shorter = _shorter(chat)
    fits, least = len(shorter) - 1, 1
    while least < fits:
        tried = (least + fits) // 2
        if await _fits(service, shorter[tried], headers):
            fits = tried
        else:
            least = tried + 1
    return shorter[fits]


def _shorter(chat: ChatBody) -> list[ChatBody]:
    """Return a chat, then without its first turn, its first two, and so on to the last one alone."""
    messages = chat.messages
    begins = [nth for nth, message in enumerate(messages) if message.role == "user"]
    system = next(
        (nth for nth, message in enumerate(messages) if message.role not in ("system", "developer")), 0
    )
    cut = [messages[:system] + messages[begin:] for begin in begins if begin > system]
    return [chat, *(chat.model_copy(update={"messages": kept}) for kept in cut)]


async def _fits(service: GenerationService, chat: ChatBody, headers: Mapping[str, str]) -> bool:
    try:
        tokens = await Conversation(service, chat, headers).prompt_tokens()
    except PromptTooLong:
        return False
    return tokens + _answer(chat, service) <= service.limits.max_seq_len


def _answer(chat: ChatBody, service: GenerationService) -> int:
    """Return how many tokens of answer a chat must leave room for."""
    if chat.max_completion_tokens is not None:
        return chat.max_completion_tokens
    return min(service.default_max_tokens or 1, service.limits.max_seq_len - 1)
