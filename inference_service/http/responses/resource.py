"""A response as an object: the fields of its request, its output, and how it ended.

Source: `openai.types.responses.Response`; which fields there must be, https://www.openresponses.org/reference
"""

from __future__ import annotations

import time
from typing import Any

from inference_service.adapters.defaults import AdapterDefaults
from inference_service.chat.request import DEFAULT_TEMPERATURE, AllowedTools, NamedTool, ToolChoice
from inference_service.core.sequence import EndReason
from inference_service.http.responses.answers import AnsweredItem, Response, ResponseError, ResponseUsage
from inference_service.http.responses.schema import ResponsesBody, TextConfig
from inference_service.http.wire.errors import error_body, status_of
from inference_service.http.wire.reply import Head
from inference_service.serving.request import AnswerFinished
from inference_service.serving.terms import first
from loramux_shared.faults import Fault


class ResponseObject:
    """A response to one body, in each of its states."""

    def __init__(self, body: ResponsesBody, head: Head, defaults: AdapterDefaults) -> None:
        """Describe the response to a body that was accepted; defaults are those of the model that answers."""
        self._under_way: Response = {
            "id": head.id,
            "object": "response",
            "created_at": head.created,
            "model": head.model,
            "status": "in_progress",
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "tools": [tool.to_dict() for tool in body.tools or ()],
            "tool_choice": _choice(body.tool_choice),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "text": _text(body.text),
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "temperature": first(body.temperature, defaults.temperature, DEFAULT_TEMPERATURE),
            "top_p": first(body.top_p, defaults.top_p, 1.0),
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "top_logprobs": body.top_logprobs or 0,
            "truncation": body.truncation or "disabled",
            "metadata": body.metadata or {},
            "user": body.user,
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
            "service_tier": "default",
            "store": False,
            "background": False,
            "previous_response_id": None,
        }

    def under_way(self) -> Response:
        """Return the response before anything is answered."""
        return self._under_way

    def ended(self, finished: AnswerFinished, output: list[AnsweredItem], reasoning_tokens: int) -> Response:
        """Return the response with its output."""
        whole: Response = {**self._under_way, "output": output, "usage": usage_of(finished, reasoning_tokens)}
        if finished.reason is EndReason.LENGTH:
            return {**whole, "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        return {**whole, "status": "completed", "completed_at": int(time.time())}

    def failed(self, fault: Fault, output: list[AnsweredItem]) -> Response:
        """Return the response with the output before it failed."""
        return {**self._under_way, "status": "failed", "error": _error(fault), "output": output}


def _choice(choice: ToolChoice | None) -> str | dict[str, Any]:
    match choice:
        case NamedTool(name):
            return {"type": "function", "name": name}
        case AllowedTools(mode, names):
            tools = [{"type": "function", "name": name} for name in names]
            return {"type": "allowed_tools", "mode": mode, "tools": tools}
    return choice or "auto"


def _text(text: TextConfig | None) -> dict[str, Any]:
    text_format = text.format if text else None
    form: dict[str, Any] = {"type": text_format.type if text_format else "text"}
    if text_format and text_format.schema_ is not None:
        form |= {
            "name": text_format.name,
            "description": text_format.description,
            "schema": text_format.schema_,
        }
        form["strict"] = text_format.strict is not False
    return {"format": form, "verbosity": "medium"}


def usage_of(finished: AnswerFinished, reasoning_tokens: int) -> ResponseUsage:
    """Return the tokens of a response."""
    return {
        "input_tokens": finished.prompt_tokens,
        "input_tokens_details": {"cached_tokens": finished.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": finished.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
    }


def _error(fault: Fault) -> ResponseError:
    """Return a fault as the error of a response: code is one of OpenAI's, reason is the fault's own name."""
    error, status = error_body(fault)["error"], status_of(fault)
    code = "rate_limit_exceeded" if status == 429 else "invalid_prompt" if status < 500 else "server_error"
    return {**error, "code": code, "reason": error["code"] or ""}
