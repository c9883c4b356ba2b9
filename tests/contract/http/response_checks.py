"""Invariants of every response: its fields, its events, and their agreement."""

import json
from typing import Any, Final

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

EVENT: Final = TypeAdapter(ResponseStreamEvent)
REQUIRED: Final = frozenset(
    {
        *("id", "object", "created_at", "completed_at", "status", "incomplete_details", "model"),
        *("previous_response_id", "instructions", "output", "error", "tools", "tool_choice", "truncation"),
        *("parallel_tool_calls", "text", "top_p", "presence_penalty", "frequency_penalty", "top_logprobs"),
        *("temperature", "reasoning", "usage", "max_output_tokens", "max_tool_calls", "store", "background"),
        *("service_tier", "metadata", "safety_identifier", "prompt_cache_key"),
    }
)
"""Fields that https://www.openresponses.org/reference asks of every response."""
ENDS: Final = ("completed", "incomplete", "failed")


def check_response(response: dict[str, Any]) -> dict[str, Any]:
    """Look at a response by itself."""
    Response.model_validate(response)
    assert response.keys() >= REQUIRED
    *done, last = response["output"] or [{"status": response["status"]}]
    assert all(item["status"] == "completed" for item in done)
    if response["status"] != "in_progress":
        assert last["status"] == ("completed" if response["status"] == "completed" else "incomplete")
    assert (response["usage"] is not None) == (response["status"] in ("completed", "incomplete"))
    assert (response["error"] is not None) == (response["status"] == "failed")
    assert (response["incomplete_details"] is not None) == (response["status"] == "incomplete")
    assert (response["completed_at"] is not None) == (response["status"] == "completed")
    return response


def read_stream(body: bytes) -> list[dict[str, Any]]:
    """Return the events of a stream, each of which is named by its type and numbered."""
    *frames, done, rest = body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    events = []
    for number, frame in enumerate(frames):
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        EVENT.validate_python(event)
        events.append(event)
    return events


def check_events(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Look at the events of a stream, and return the response that they end with."""
    begun, going, *reported, end = events
    assert [begun["type"], going["type"]] == ["response.created", "response.in_progress"]
    assert begun["response"] == going["response"] == check_response(going["response"])
    assert end["type"] == f"response.{end['response']['status']}"
    assert end["response"]["status"] in ENDS
    output: list[dict[str, Any]] = []
    grown: dict[str, Any] = {}
    for event in reported:
        _grow(output, grown, event)
    last = check_response(end["response"])
    if last["status"] == "failed":
        assert [item["id"] for item in last["output"]] == [item["id"] for item in output]
    else:
        assert last["output"] == output
    return last


def _grow(output: list[dict[str, Any]], grown: dict[str, Any], event: dict[str, Any]) -> None:
    """Apply an event to the output so far; grown is the last item as it grows."""
    kind, index = event["type"].removeprefix("response."), event["output_index"]
    match kind:
        case "output_item.added":
            assert index == len(output)
            assert all(item["status"] == "completed" for item in output)
            assert event["item"]["status"] == "in_progress"
            output.append(event["item"])
            grown.clear()
            grown.update(text="", logprobs=[], done=0)
            return
        case "output_item.done":
            item = event["item"]
            assert index == len(output) - 1
            assert item["id"] == output[index]["id"]
            assert item.get("arguments", "") == grown["text"] or item["content"][0]["text"] == grown["text"]
            output[index] = item
            return
    assert event["item_id"] == output[index]["id"]
    assert index == len(output) - 1
    match kind.rpartition(".")[2]:
        case "added":
            assert event["part"]["text"] == ""
            assert not event["part"].get("logprobs")
        case "delta":
            grown["text"] += event["delta"]
            grown["logprobs"] += event.get("logprobs", ())
        case "done":
            whole = event.get("part", event)
            assert whole.get("text", whole.get("arguments")) == grown["text"]
            assert whole.get("logprobs", []) == grown["logprobs"]
