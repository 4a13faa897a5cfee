"""The unmodified `openai` client with the app: completions and chats, whole and streamed."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest
import torch

from resplit.gateway.openai import event_stream
from resplit.gateway.openai.text import Text

HTTP = httpx.Client(verify=False, timeout=60)  # the server is on loopback, so no certificates are loaded
PROMPT = "the quick brown fox"


@pytest.fixture
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)


def _greedy(model, prompt: tuple[int, ...], new_tokens: int, **settings) -> list[int]:
    """The tokens that `generate` adds to the prompt, the end of text included."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, **settings
    )
    return out[0, len(prompt) :].tolist()


def test_a_completion_is_the_text_of_the_tokens_that_transformers_generates(client, model, text: Text) -> None:
    expected = _greedy(model, text.encode(PROMPT), 24)
    answer = client.completions.create(model="tiny-random-llama", prompt=PROMPT, max_tokens=24, temperature=0)
    assert answer.choices[0].text == text.decode(expected)
    assert answer.usage.completion_tokens == len(expected)
    assert answer.usage.prompt_tokens == len(text.encode(PROMPT))
    assert (answer.object, answer.model) == ("text_completion", "tiny-random-llama")


def test_a_prompt_may_be_token_ids_and_the_answer_may_contain_them(client, model, text: Text) -> None:
    prompt = text.encode(PROMPT)
    answer = client.completions.create(
        model="tiny-random-llama",
        prompt=list(prompt),
        max_tokens=40,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    assert answer.choices[0].token_ids == _greedy(model, prompt, 40, eos_token_id=None)
    assert answer.choices[0].finish_reason == "length"


def test_the_end_of_text_ends_the_answer_unless_it_is_ignored(client, model, text: Text) -> None:
    prompt, expected = next(
        (ids, out) for ids in ([i] for i in range(4, 300)) if (out := _greedy(model, ids, 30))[-1] == 0
    )
    answer = client.completions.create(model="tiny-random-llama", prompt=prompt, max_tokens=31)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == text.decode(expected)
    assert answer.usage.completion_tokens == len(expected)


def test_the_chunks_of_a_stream_join_to_the_whole_answer(client) -> None:
    parameters = {"model": "tiny-random-llama", "prompt": PROMPT, "max_tokens": 30}
    whole = client.completions.create(**parameters)
    chunks = list(client.completions.create(**parameters, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_every_token_has_its_own_chunk_if_token_ids_are_requested(client) -> None:
    parameters = {"model": "tiny-random-llama", "prompt": PROMPT, "max_tokens": 12}
    extensions = {"return_token_ids": True, "ignore_eos": True}
    chunks = list(client.completions.create(**parameters, stream=True, extra_body=extensions))
    assert [len(chunk.choices[0].token_ids) for chunk in chunks] == [1] * 12


def test_a_chat_is_the_completion_of_its_rendered_template(client, model, text: Text) -> None:
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "the lazy dog"}]
    prompt = text.encode_chat([{"role": "system", "content": "be brief"}, messages[1]])
    answer = client.chat.completions.create(model="tiny-random-llama", messages=messages, max_completion_tokens=20)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == text.decode(_greedy(model, prompt, 20))
    assert answer.usage.prompt_tokens == len(prompt)


def test_a_client_may_send_an_answer_back_and_parts_are_joined(client, server) -> None:
    first = client.chat.completions.create(
        model="tiny-random-llama", messages=[{"role": "user", "content": "a"}], max_tokens=3
    )
    parts = [{"type": "text", "text": "lazy "}, {"type": "text", "text": "dog"}]
    again = [{"role": "user", "content": "a"}, first.choices[0].message, {"role": "user", "content": parts}]
    client.chat.completions.create(model="tiny-random-llama", messages=again, max_tokens=3)
    plain = [*again[:2], {"role": "user", "content": "lazy dog"}]
    client.chat.completions.create(model="tiny-random-llama", messages=plain, max_tokens=3)
    assert server[1].seen[-1].prompt_ids == server[1].seen[-2].prompt_ids


async def test_chats_stream_to_asynchronous_clients(server) -> None:
    parameters = {"model": "tiny-random-llama", "messages": [{"role": "user", "content": "the fox"}], "max_tokens": 20}
    async with openai.AsyncOpenAI(base_url=f"{server[0]}/v1", api_key="none") as client:
        whole = await client.chat.completions.create(**parameters)
        stream = await client.chat.completions.create(**parameters, stream=True)
        chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks)


def test_a_chat_without_max_tokens_gets_what_is_usual_and_fits(client, server) -> None:
    for content, fits in (("a", True), ("a" * 110, False)):
        client.chat.completions.create(model="tiny-random-llama", messages=[{"role": "user", "content": content}])
        request = server[1].seen[-1]
        room = server[1].context_tokens - len(request.prompt_ids)
        assert request.max_new_tokens == (server[1].usual if fits else room)
        assert request.until_deadline


@pytest.mark.parametrize("stream", [False, True])
def test_without_max_tokens_the_deadline_ends_the_answer_and_keeps_what_exists(serve, stream: bool) -> None:
    url, engine = serve(step_s=0.05, usual=100)
    late = {"X-Resplit-Deadline-S": "1"}
    body = {"model": "tiny-random-llama", "messages": [{"role": "user", "content": "the fox"}], "stream": stream}
    answer = HTTP.post(f"{url}/v1/chat/completions", json=body, headers=late)
    assert answer.status_code == 200
    if stream:
        *_, last, done, _ = answer.text.split("\n\n")
        assert (json.loads(last[6:])["choices"][0]["finish_reason"], done) == ("length", "data: [DONE]")
    else:
        assert answer.json()["choices"][0]["finish_reason"] == "length"
        assert 0 < answer.json()["usage"]["completion_tokens"] < 100
    assert engine.idle.wait(5)


def test_a_stream_without_a_token_yet_is_kept_open_by_comments(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "PING_EVERY_S", 0.05)
    url, _ = serve(first_s=0.3)
    body = {"model": "tiny-random-llama", "prompt": "the fox", "max_tokens": 2, "stream": True}
    *events, done, _ = HTTP.post(f"{url}/v1/completions", json=body).text.split("\n\n")
    kinds = [event.partition(": ")[0] or "ping" for event in events]
    assert set(kinds) == {"ping", "data"}
    assert kinds == sorted(kinds, reverse=True)
    assert done == "data: [DONE]"


def test_a_stop_string_ends_the_answer_and_is_never_shown(client, server) -> None:
    parameters = {"model": "tiny-random-llama", "prompt": PROMPT, "max_tokens": 40, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**parameters).choices[0].text
    stop = whole[5:9]
    expected = whole[: whole.index(stop)]
    answer = client.completions.create(**parameters, stop=[stop, "never there"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
    assert answer.usage.completion_tokens < 40
    chunks = list(client.completions.create(**parameters, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert server[1].idle.wait(5)  # the engine stops as well


async def test_concurrent_streams_do_not_affect_one_another(server) -> None:
    prompts = [f"the {word} 日本 🙂" for word in ("quick", "brown", "fox", "lazy", "dog", "bear")]
    async with openai.AsyncOpenAI(base_url=f"{server[0]}/v1", api_key="none") as client:

        async def streamed(prompt: str) -> str:
            parameters = {
                "model": "tiny-random-llama",
                "prompt": prompt,
                "max_tokens": 30,
                "extra_body": {"ignore_eos": True},
            }
            return "".join(
                [chunk.choices[0].text async for chunk in await client.completions.create(**parameters, stream=True)]
            )

        alone = [await streamed(prompt) for prompt in prompts]
        together = await asyncio.gather(*map(streamed, prompts))
    assert together == alone
    assert len(set(alone)) == len(prompts)


def test_sampling_is_repeatable_with_a_seed_only(client, server) -> None:
    parameters = {"model": "tiny-random-llama", "prompt": PROMPT, "max_tokens": 16, "temperature": 1.0}
    one, same, other = (client.completions.create(**parameters, seed=seed).choices[0].text for seed in (-3, -3, 4))
    assert one == same != other
    client.completions.create(**parameters)
    client.completions.create(**parameters)
    assert server[1].seen[-1].sampling.seed != server[1].seen[-2].sampling.seed


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0},
        {"temperature": 1e-300},
        {"temperature": 1, "top_p": 0},
        {"temperature": 1, "top_p": 1e-46},
    ],
)
def test_settings_that_leave_no_choice_are_greedy(client, server, settings: dict[str, float]) -> None:
    client.completions.create(model="tiny-random-llama", prompt="a", max_tokens=1, **settings)
    assert server[1].seen[-1].sampling.temperature == 0


def test_parameters_that_do_not_change_the_answer_are_accepted(client) -> None:
    client.chat.completions.create(
        model="tiny-random-llama",
        messages=[{"role": "user", "content": "a", "name": "ada"}],
        max_tokens=1,
        n=1,
        user="me",
        metadata={"run": "1"},
        store=False,
        frequency_penalty=0,
        logprobs=False,
        response_format={"type": "text"},
        tools=[],
    )


def test_the_served_model_is_listed(client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-random-llama"]
    assert client.models.retrieve("tiny-random-llama").owned_by == "resplit"


OTHER_SERVERS = [
    {"role": "user", "content": "a"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "hm",
        "id": "m1",
        "annotations": [],
        "tool_calls": [{"id": "c1", "type": "function", "index": 0, "function": {"name": "f", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "42"},
]


def test_a_conversation_with_the_fields_of_other_servers_is_accepted(server) -> None:
    body = {"model": "tiny-random-llama", "messages": OTHER_SERVERS, "max_tokens": 2}
    assert HTTP.post(f"{server[0]}/v1/chat/completions", json=body).status_code == 200
    misspelt = HTTP.post(f"{server[0]}/v1/chat/completions", json=body | {"temprature": 1})
    assert (misspelt.status_code, misspelt.json()["error"]["param"]) == (400, "temprature")


def test_monitors_and_proxies_find_the_paths_that_they_expect(server) -> None:
    url, engine = server
    for path in ("/healthz", "/health", "/readyz"):
        assert (HTTP.head(url + path).status_code, HTTP.head(url + path).text) == (200, "")
    assert HTTP.get(f"{url}/version").json()["version"]
    models = HTTP.get(f"{url}/v1/models/").json()
    assert models == HTTP.get(f"{url}/v1/models").json()
    assert models["data"][0]["max_model_len"] == engine.context_tokens


def test_an_answer_carries_the_id_of_its_request_or_a_new_one(server) -> None:
    for path, status in (("/v1/models", 200), ("/v1/nothing", 404), ("/healthz", 200)):
        named = HTTP.get(server[0] + path, headers={"X-Request-Id": "job-7"})
        assert (named.status_code, named.headers["x-request-id"]) == (status, "job-7")
    made = {
        HTTP.get(f"{server[0]}/v1/models", headers={"X-Request-Id": bad}).headers["x-request-id"] for bad in ("", "a b")
    }
    assert all(len(each) == 32 for each in made)


def test_a_text_or_a_conversation_can_be_tokenized(server, text: Text) -> None:
    messages = [{"role": "user", "content": "the fox"}]
    plain = HTTP.post(f"{server[0]}/tokenize", json={"prompt": PROMPT}).json()
    chat = HTTP.post(f"{server[0]}/tokenize", json={"model": "tiny-random-llama", "messages": messages}).json()
    assert tuple(plain["tokens"]) == text.encode(PROMPT)
    assert (tuple(chat["tokens"]), chat["count"]) == (text.encode_chat(messages), len(chat["tokens"]))
    assert HTTP.post(f"{server[0]}/tokenize", json={}).status_code == 400


def test_token_ids_become_a_text(server, text: Text) -> None:
    def answered(tokens: list[int]) -> httpx.Response:
        return HTTP.post(f"{server[0]}/detokenize", json={"model": "tiny-random-llama", "tokens": tokens})

    assert answered(list(text.encode(PROMPT))).json() == {"prompt": PROMPT}
    unknown, long = answered([text.vocabulary]), answered([1] * 5000)
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "tokens")
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")


# What clients and benchmarks of vLLM and llama.cpp send even where it changes nothing.
HABITS = {
    "repetition_penalty": 1.0,
    "repeat_penalty": 1.0,
    "length_penalty": 1.0,
    "typical_p": 1.0,
    "min_tokens": 0,
    "use_beam_search": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "prompt_logprobs": None,
    "truncate_prompt_tokens": None,
    "cache_prompt": True,
    "cache_salt": "a",
    "request_id": "a",
    "priority": 1,
}


def test_what_clients_of_other_servers_always_send_changes_nothing(server) -> None:
    base = {"model": "tiny-random-llama", "max_tokens": 5}
    stream = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": False}}
    chat_habits = {"echo": False, "add_generation_prompt": True, "continue_final_message": False}
    chat_habits |= {"add_special_tokens": False, "chat_template": None, "chat_template_kwargs": {}}
    cases = [
        ("/v1/completions", {"prompt": PROMPT}, {"add_special_tokens": True}, "text"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the fox"}]}, chat_habits, "message"),
    ]
    for path, asked, habits, key in cases:
        plain, other = (HTTP.post(server[0] + path, json=base | asked | more).json() for more in ({}, HABITS | habits))
        assert plain["choices"][0][key] == other["choices"][0][key]
        assert HTTP.post(server[0] + path, json=base | asked | HABITS | habits | stream).status_code == 200


def test_the_end_of_a_chat_can_be_ignored_but_not_the_end_of_a_form(server) -> None:
    body = {"model": "tiny-random-llama", "messages": [{"role": "user", "content": "the fox"}], "ignore_eos": True}
    engine = server[1]
    engine.seen.clear()
    answer = HTTP.post(f"{server[0]}/v1/chat/completions", json=body | {"max_tokens": 12})
    assert (answer.status_code, engine.seen[-1].stop_ids) == (200, frozenset())
    refused = HTTP.post(f"{server[0]}/v1/chat/completions", json=body | {"response_format": {"type": "json_object"}})
    assert refused.status_code == 400
    assert "'ignore_eos' cannot be combined" in refused.json()["error"]["message"]


def test_a_stream_consists_of_server_sent_events(server) -> None:
    body = {"model": "tiny-random-llama", "prompt": PROMPT, "max_tokens": 3, "stream": True}
    answer = HTTP.post(f"{server[0]}/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last, nothing = answer.text.split("\n\n")
    assert (last, nothing) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events)


def test_a_client_is_the_holder_of_a_key_else_an_address(server) -> None:
    url, engine = server
    engine.seen.clear()
    body = {"model": "tiny-random-llama", "prompt": "the quick", "max_tokens": 1}
    for key in ("key-batch", "key-interactive", "key-batch", "made-up", None):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=headers).status_code == 200
    batch, interactive, again, unknown, without = [request.client for request in engine.seen]
    assert batch == again != interactive
    assert unknown == without == "127.0.0.1"
    assert "key" not in batch + interactive


def test_the_class_comes_from_the_key_then_the_header_then_the_default(server) -> None:
    def seen(key: str, **headers: str) -> str:
        client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key=key, default_headers=headers)
        client.completions.create(model="tiny-random-llama", prompt="a", max_tokens=1)
        return server[1].seen[-1].request_class

    assert seen("key-batch") == "batch"
    assert seen("key-batch", **{"X-Resplit-Class": "interactive"}) == "batch"
    assert seen("unknown", **{"X-Resplit-Class": "batch"}) == "batch"
    assert seen("unknown") == "interactive"


def test_a_deadline_can_be_shortened_but_not_lengthened(server) -> None:
    def seen(deadline_s: str) -> float:
        client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="x")
        headers = {"X-Resplit-Deadline-S": deadline_s}
        client.completions.create(model="tiny-random-llama", prompt="a", max_tokens=1, extra_headers=headers)
        return server[1].seen[-1].deadline_s

    assert 15 < seen("20") <= 20
    assert 110 < seen("1e9") <= 120
