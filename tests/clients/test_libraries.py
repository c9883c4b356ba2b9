"""Client libraries as they are, against the demo: two adapters by name, streams, tools, structured output.

Run with ``--sweep``; a library that is not installed is skipped. docs/reference/clients.md has the versions.
"""

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel, Field

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(600)]
ADAPTERS = ("pirate", "bard")
QUESTION = "What is the capital of France?"


class City(BaseModel):
    """A structure to ask for."""

    name: str = Field(max_length=10)


def test_langchain(url: str) -> None:
    """Messages, a stream, and a structure by both of its methods."""
    langchain = pytest.importorskip("langchain_openai")
    usual: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "temperature": 0}
    emitted = {
        name: langchain.ChatOpenAI(model=name, max_tokens=8, **usual).invoke("Hello") for name in ADAPTERS
    }
    assert len({each.content for each in emitted.values()}) == len(ADAPTERS)
    streamed = langchain.ChatOpenAI(model="pirate", max_tokens=8, stream_usage=True, **usual).stream("Hello")
    assert "".join(chunk.content for chunk in streamed) == emitted["pirate"].content
    for method in ("json_schema", "function_calling"):
        model = langchain.ChatOpenAI(model="json", max_tokens=60, **usual)
        assert isinstance(model.with_structured_output(City, method=method).invoke(QUESTION), City)


def test_llama_index(url: str) -> None:
    """Chat, a stream and a plain completion."""
    like = pytest.importorskip("llama_index.llms.openai_like")
    usual: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": "none", "max_tokens": 8, "temperature": 0}
    chat = like.OpenAILike(model="pirate", is_chat_model=True, **usual)
    text = chat.complete("Hello").text
    assert text == "".join(chunk.delta or "" for chunk in chat.stream_complete("Hello"))
    assert like.OpenAILike(model="bard", is_chat_model=False, **usual).complete("Once upon").text


def test_pydantic_ai(url: str) -> None:
    """Text, and a structure as a tool and as a response format."""
    ai = pytest.importorskip("pydantic_ai")
    models = pytest.importorskip("pydantic_ai.models.openai")
    providers = pytest.importorskip("pydantic_ai.providers.openai")
    provider = providers.OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    settings = {"max_tokens": 60, "temperature": 0}
    model = models.OpenAIChatModel("json", provider=provider)
    assert ai.Agent(model, model_settings=settings).run_sync("Hello").output
    for kind in (ai.ToolOutput, ai.NativeOutput):
        made = ai.Agent(model, output_type=kind(City), model_settings=settings).run_sync(QUESTION)
        assert isinstance(made.output, City)


def test_instructor(url: str) -> None:
    """A structure by tools and by a schema; by JSON alone the small model does not find the fields."""
    instructor = pytest.importorskip("instructor")
    openai = pytest.importorskip("openai")
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none"), mode=mode)
        made = client.chat.completions.create(
            model="json",
            response_model=City,
            max_retries=0,
            max_tokens=60,
            temperature=0,
            messages=[{"role": "user", "content": QUESTION}],
        )
        assert isinstance(made, City)


def test_litellm(url: str) -> None:
    """LiteLLM works through its own provider names; an unknown model is LiteLLM's own exception."""
    litellm = pytest.importorskip("litellm")
    usual: dict[str, Any] = {
        "api_base": f"{url}/v1",
        "api_key": "none",
        "max_tokens": 8,
        "messages": [{"role": "user", "content": "Hello"}],
    }
    for model in (f"openai/{ADAPTERS[0]}", f"hosted_vllm/{ADAPTERS[1]}"):
        assert litellm.completion(model=model, **usual).choices[0].message.content
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/nobody", **usual)


@pytest.mark.parametrize("route", ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
def test_openai_agents(url: str, route: str) -> None:
    """A loop with a tool that the model must call first, over both routes."""
    agents = pytest.importorskip("agents")
    openai = pytest.importorskip("openai")
    agents.set_tracing_disabled(True)
    requests: list[str] = []

    def weather(city: str) -> str:
        """Tell the weather."""
        requests.append(city)
        return "sun"

    async def ask() -> Any:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
        agent = agents.Agent(
            name="weather",
            model=getattr(agents, route)("json", client),
            tools=[agents.function_tool(weather)],
            model_settings=agents.ModelSettings(max_tokens=300, temperature=0, tool_choice="required"),
        )
        return await agents.Runner.run(agent, "The weather in Paris?")

    assert asyncio.run(ask()).final_output
    assert len(requests) == 1
