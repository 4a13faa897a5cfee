"""The unmodified client `pydantic-ai` with the app: its answers are objects, whatever the model prefers."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

MODEL = "tiny-random-llama"
SETTINGS = ModelSettings(max_tokens=200)


class Animal(BaseModel):
    kind: Literal["dog", "fox"]
    lazy: bool


@pytest.fixture(scope="module")
def provider(serve) -> OpenAIProvider:
    """A gateway with room for a prompt that explains tools."""
    return OpenAIProvider(base_url=f"{serve(context_tokens=4096)[0]}/v1", api_key="none")


@pytest.fixture
def chat(provider: OpenAIProvider) -> OpenAIChatModel:
    return OpenAIChatModel(MODEL, provider=provider)


@pytest.mark.parametrize("form", [ToolOutput, NativeOutput])
async def test_the_answer_is_an_object_by_a_tool_or_by_a_schema(chat: OpenAIChatModel, form: type) -> None:
    agent = Agent(chat, output_type=form(Animal), retries=0, model_settings=SETTINGS)
    first = await agent.run("the lazy dog")
    assert isinstance(first.output, Animal)
    again = await agent.run("and the quick fox", message_history=first.all_messages())
    assert isinstance(again.output, Animal)
    assert again.usage.input_tokens > first.usage.input_tokens


async def test_an_object_grows_as_it_is_streamed(chat: OpenAIChatModel) -> None:
    agent = Agent(chat, output_type=NativeOutput(Animal), retries=0, model_settings=SETTINGS)
    async with agent.run_stream("the lazy dog") as run:
        seen = [animal async for animal in run.stream_output(debounce_by=None)]
    assert seen[-1] == (await agent.run("the lazy dog")).output


async def test_a_schema_holds_over_responses_too(provider: OpenAIProvider) -> None:
    agent = Agent(
        OpenAIResponsesModel(MODEL, provider=provider),
        output_type=NativeOutput(Animal),
        retries=0,
        model_settings=SETTINGS,
    )
    assert isinstance((await agent.run("the lazy dog")).output, Animal)
