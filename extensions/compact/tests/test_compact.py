"""Summaries of conversations: what the model is asked, what comes back, and how a chat goes on with it."""

from typing import Any

import pytest

from inference_service.core.sequence import EndReason
from inference_service.http.responses.items import uncarried
from inference_service.http.responses.mapping import SUMMED_UP
from loramux_compact.summary import ASK, NO_SUMMARY, CompactBody
from loramux_shared.runtime import ReasoningParser
from tests.contract.http.test_responses import api as api
from tests.support.generations import change_deployed
from tests.support.talker import TalkerApi
from tests.unit.project import test_knobs as knobs

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATH = "/v1/responses"
FIELDS: dict[str, Any] = {"model": "pirate", "input": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
HI = {"role": "user", "content": "Hi"}
COMPACT = f"{PATH}/compact"


async def test_a_summary_goes_on_in_the_place_of_a_conversation(api: TalkerApi) -> None:
    """The model summarises, instructions stay, and an encrypted summary is sent to the model again."""
    api.talker.say("They| launch.\n", reason=EndReason.LENGTH)
    ahoy = {"role": "assistant", "content": "Ahoy"}
    compacted = await api.openai.responses.compact(model="pirate", input=[SYSTEM, HI, ahoy])
    assert api.talker.last[:-1] == [SYSTEM, HI, ahoy]
    assert api.talker.last[-1] == {"role": "user", "content": ASK}
    assert api.talker.asked[-1].sampling.temperature == 0
    assert compacted.object == "response.compaction"
    assert compacted.usage.output_tokens == len("They launch.\n")
    reported: Any = compacted.to_dict(warnings=False)["output"]
    assert [item["type"] for item in reported] == ["message", "compaction"]
    for before in ([], [HI, ahoy]):
        api.talker.say("So.")
        await api.post(PATH, model="pirate", input=[reported[0], *before, reported[1], HI])
        summed_up = f"Be brief.\n\n{SUMMED_UP}They launch."
        assert api.talker.last == [{"role": "system", "content": summed_up}, HI]


async def test_the_question_for_a_summary_is_no_second_turn_of_the_user(api: TalkerApi) -> None:
    """The question is part of the user's turn, as templates may refuse two; reasoning is not in the summary."""
    change_deployed(api.talker.catalog, reasoning_parser=ReasoningParser.THINK)
    api.talker.say("<think>Hm.</think>So.")
    answer = (await api.post(COMPACT, **FIELDS, instructions="Be brief.", temperature=0.5)).json()
    assert api.talker.last == [SYSTEM, {"role": "user", "content": f"Hi\n\n{ASK}"}]
    [request] = api.talker.asked[-1:]
    assert (request.sampling.temperature, request.prompt.chat_template_kwargs["enable_thinking"]) == (
        0.5,
        False,
    )
    [compaction] = answer["output"]
    assert uncarried(compaction["encrypted_content"]) == "So."
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"]


async def test_what_cannot_be_summed_up_is_refused(api: TalkerApi) -> None:
    """A call without output, reasoning alone, a stored conversation and an empty answer are refused."""
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    for body, param in (
        ({"model": "pirate", "input": [HI, call]}, "input[1]"),
        ({"model": "pirate", "input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"model": "pirate", "input": "Hi", "previous_response_id": "r"}, "previous_response_id"),
        ({"input": "Hi"}, "model"),
    ):
        refused = await api.post(COMPACT, **body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    api.talker.say(" \n")
    refused = await api.post(COMPACT, **FIELDS)
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, NO_SUMMARY)


async def test_its_fields_are_those_of_requests_and_may_be_null() -> None:
    """A field has the name that it has in requests, and null is the same as unset."""
    knobs.test_http_fields_pass_by_name(CompactBody)
    needed = {"model": "m", "input": "x"}
    unset = {name: None for name, field in CompactBody.model_fields.items() if not field.is_required()}
    assert CompactBody.model_validate(unset | needed) == CompactBody.model_validate(needed)
