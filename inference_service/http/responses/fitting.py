"""Conversations that are longer than what is served: ``truncation: "auto"``."""

from __future__ import annotations

from dataclasses import replace

from inference_service.chat.conversation import Conversation
from inference_service.chat.request import ChatRequest
from inference_service.serving.service import GenerationService
from loramux_shared.faults import PromptTooLong


async def fitted(service: GenerationService, chat: ChatRequest) -> ChatRequest:
    """Return a chat that leaves its answer room: without as many of the first turns as it takes, and no more.

    A turn begins where the user speaks; system messages before the first one stay. Of a conversation whose last
    turn is too long, that is returned.

    Raises:
        Fault: the chat cannot be counted, for another reason than its length.
    """
    if await _fits(service, chat):
        return chat
    shorter = _shorter(chat)
    fits, least = len(shorter) - 1, 1
    while least < fits:
        tried = (least + fits) // 2
        if await _fits(service, shorter[tried]):
            fits = tried
        else:
            least = tried + 1
    return shorter[fits]


def _shorter(chat: ChatRequest) -> list[ChatRequest]:
    """Return a chat, then without its first turn, its first two, and so on to the last one alone."""
    turns = chat.turns
    begins = [nth for nth, turn in enumerate(turns) if turn.role == "user"]
    system = next((nth for nth, turn in enumerate(turns) if turn.role not in ("system", "developer")), 0)
    cut = [turns[:system] + turns[begin:] for begin in begins if begin > system]
    return [chat, *(replace(chat, turns=rest) for rest in cut)]


async def _fits(service: GenerationService, chat: ChatRequest) -> bool:
    try:
        tokens = await Conversation(service, chat).prompt_tokens()
    except PromptTooLong:
        return False
    return tokens + _answer(chat, service) <= service.limits.max_seq_len


def _answer(chat: ChatRequest, service: GenerationService) -> int:
    """Return how many tokens of answer a chat must leave room for."""
    if chat.rest.sampling.max_tokens is not None:
        return chat.rest.sampling.max_tokens
    return min(service.default_max_tokens or 1, service.limits.max_seq_len - 1)
