"""The unmodified `openai` client with /v1/responses: the same answers as chats, in another form."""

from __future__ import annotations

from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.support.eventually import eventually

MODEL = "tiny-random-llama"
HTTP = httpx.Client(verify=False, timeout=60)  # the server is on loopback, so no certificates are loaded
REQUEST = {"model": MODEL, "input": "the quick brown fox", "max_output_tokens": 12}


class Animal(BaseModel):
    kind: Literal["dog", "fox"]
    lazy: bool


@pytest.fixture(scope="module")
def roomy(serve) -> str:
    return serve(context_tokens=1024)[0]


@pytest.fixture
def client(roomy: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{roomy}/v1", api_key="none", max_retries=0)


def _chat(client: openai.OpenAI, messages: list[dict[str, str]]) -> tuple[str, int]:
    chat = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12)
    return chat.choices[0].message.content, chat.usage.prompt_tokens


def test_a_response_says_what_a_chat_says(client) -> None:
    answer = client.responses.create(**REQUEST, instructions="be brief")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": REQUEST["input"]}]
    assert (answer.output_text, answer.usage.input_tokens) == _chat(client, messages)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.total_tokens == answer.usage.input_tokens + 12


def test_an_earlier_answer_may_be_sent_back_as_it_came(client) -> None:
    first = client.responses.create(**REQUEST)
    asked = [{"role": "user", "content": [{"type": "input_text", "text": "the fox"}]}]
    answer = client.responses.create(**REQUEST | {"input": [*asked, *first.output, *asked]})
    again = [{"role": role, "content": text} for role, text in [("user", "the fox"), ("assistant", first.output_text)]]
    assert (answer.output_text, answer.usage.input_tokens) == _chat(client, [*again, again[0]])


def test_a_stream_has_the_events_that_the_client_reads(client) -> None:
    whole = client.responses.create(**REQUEST)
    events = list(client.responses.create(**REQUEST, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds == [*begin, *["output_text.delta"] * len(deltas), *end]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(deltas) == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage == whole.usage


def test_a_response_follows_a_schema_whole_and_streamed(client) -> None:
    request = REQUEST | {"text_format": Animal, "max_output_tokens": 110}
    answer = client.responses.parse(**request)
    assert isinstance(answer.output_parsed, Animal)
    assert answer.status == "completed"
    with client.responses.stream(**request) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_parsed == answer.output_parsed
    assert kinds[-1] == "response.completed"


def test_every_event_has_its_name_and_nothing_follows_the_last(roomy: str) -> None:
    body = HTTP.post(f"{roomy}/v1/responses", json=REQUEST | {"stream": True}).text
    events = [event.splitlines() for event in body.strip().split("\n\n")]
    assert events[0][0] == "event: response.created"
    assert all(f'"type": "{name.removeprefix("event: ")}"' in data for name, data in events)
    assert "[DONE]" not in body


def test_a_stream_that_fails_raises_in_the_client(serve) -> None:
    url, _ = serve(broken_after=3)
    broken = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="failed to process"):
        list(broken.responses.create(**REQUEST, stream=True))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {}}]}, "tools"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"input": "x" * 20_000}, "maximum context"),
    ],
)
def test_what_is_not_served_is_refused_by_name(client, changed: dict[str, object], named: str) -> None:
    with pytest.raises(openai.BadRequestError, match=named):
        client.responses.create(
            **REQUEST | {key: value for key, value in changed.items() if key in REQUEST},
            extra_body={key: value for key, value in changed.items() if key not in REQUEST},
        )


def test_responses_are_counted_by_the_metrics(serve) -> None:
    url = serve(context_tokens=1024)[0]

    def counted() -> float:
        lines = HTTP.get(f"{url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("resplit_requests_total{"))

    openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0).responses.create(**REQUEST)
    assert eventually(lambda: counted() == 1)
