"""What evaluations ask for: several choices, log probabilities, echoes, penalties, by the `openai` client."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
import torch

from resplit.gateway.openai.schemas import CompletionRequest
from resplit.gateway.openai.text import Text

MODEL = "tiny-random-llama"
PROMPTS = ["the quick brown fox", "日本語の文章も", "lazy dog"]
HTTP = httpx.Client(verify=False, timeout=60)


@pytest.fixture
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)


def _expected(model, ids: tuple[int, ...]) -> torch.Tensor:
    """The log probabilities of the token after each position, (positions, vocabulary)."""
    return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def test_several_prompts_are_answered_in_their_order(client) -> None:
    together = client.completions.create(model=MODEL, prompt=PROMPTS, max_tokens=8)
    alone = [client.completions.create(model=MODEL, prompt=prompt, max_tokens=8) for prompt in PROMPTS]
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [choice.text for choice in together.choices] == [each.choices[0].text for each in alone]
    assert together.usage.total_tokens == sum(each.usage.total_tokens for each in alone)


def test_choices_differ_and_are_repeatable(client) -> None:
    parameters = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 1.5, "seed": 4}
    three = client.completions.create(**parameters, n=3).choices
    assert len({choice.text for choice in three}) == 3
    assert client.completions.create(**parameters, n=3).choices == three
    assert client.completions.create(**parameters).choices[0].text == three[0].text


def test_streamed_choices_join_to_the_whole_answer(client) -> None:
    parameters = {"model": MODEL, "messages": [{"role": "user", "content": "fox"}], "max_tokens": 9, "n": 3}
    sampling = {"temperature": 1.2, "seed": 1, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**parameters, **sampling)
    texts, tokens, finishes = [""] * 3, [[], [], []], {}
    for chunk in client.chat.completions.create(**parameters, **sampling, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
        finishes[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert tokens == [choice.logprobs.content for choice in whole.choices]
    assert finishes == {choice.index: choice.finish_reason for choice in whole.choices}


def test_a_chat_gives_the_log_probabilities_of_its_tokens(client, model, text: Text) -> None:
    messages = [{"role": "user", "content": "the lazy dog"}]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=6, logprobs=True, top_logprobs=3, extra_body={"top_k": 5}
    )
    ids = text.encode_chat(messages)
    for entry in answer.choices[0].logprobs.content:
        likely = _expected(model, ids)[-1]
        ids = (*ids, int(likely.argmax()))
        assert entry.token == text.token(ids[-1])
        assert entry.logprob == pytest.approx(float(likely.max()), abs=1e-4)
        assert [top.token for top in entry.top_logprobs] == [text.token(int(i)) for i in likely.topk(3).indices]
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens


@pytest.mark.parametrize("new_tokens", [0, 1, 5])
def test_an_echo_has_the_prompt_and_its_log_probabilities(client, model, text: Text, new_tokens: int) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=PROMPTS, max_tokens=new_tokens, echo=True, logprobs=1, extra_body={"ignore_eos": True}
    )
    for prompt, choice in zip(PROMPTS, answer.choices, strict=True):
        ids = text.encode(prompt)
        assert choice.text.startswith(prompt)
        first, *others = choice.logprobs.token_logprobs
        assert first is None
        assert len(others) == len(ids) - 1 + new_tokens
        scores = _expected(model, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert others[: len(ids) - 1] == pytest.approx(scores.tolist(), abs=1e-4)
        tops = choice.logprobs.top_logprobs[1:]
        assert all(max(top.values()) >= value for top, value in zip(tops, others, strict=True))
    assert answer.usage.completion_tokens == 3 * new_tokens


def test_an_echo_can_be_streamed(client) -> None:
    parameters = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 4, "echo": True}
    whole = client.completions.create(**parameters).choices[0].text
    chunks = list(client.completions.create(**parameters, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole


def test_a_bias_bans_or_forces_tokens(client, text: Text) -> None:
    plain = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 6, "extra_body": {"return_token_ids": True}}
    tokens = client.completions.create(**plain).choices[0].token_ids
    banned = client.completions.create(**plain, logit_bias={str(tokens[0]): -100}).choices[0].token_ids
    assert tokens[0] not in banned
    forced = client.completions.create(**plain, logit_bias={"9": 100}).choices[0].token_ids
    assert set(forced) == {9}


def test_penalties_make_repeated_tokens_less_likely(client) -> None:
    plain = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 40}
    extra = {"extra_body": {"return_token_ids": True, "ignore_eos": True}}

    def repeated(**penalties: float) -> int:
        tokens = client.completions.create(**plain, **extra, **penalties).choices[0].token_ids
        return len(tokens) - len(set(tokens))

    assert repeated(frequency_penalty=2, presence_penalty=2) < repeated()


def test_a_stop_token_ends_the_answer(client) -> None:
    plain = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 8}
    ids = client.completions.create(**plain, extra_body={"return_token_ids": True}).choices[0].token_ids
    last = next(place for place, token in enumerate(ids) if token not in ids[:place] and place > 1)
    cut = client.completions.create(**plain, extra_body={"stop_token_ids": [ids[last]], "return_token_ids": True})
    assert (cut.choices[0].finish_reason, cut.choices[0].token_ids) == ("stop", ids[: last + 1])


def test_sampling_settings_reach_the_engine(client, server) -> None:
    client.completions.create(
        model=MODEL, prompt="a", max_tokens=1, temperature=1, extra_body={"top_k": 7, "min_p": 0.25}
    )
    assert (server[1].seen[-1].sampling.top_k, server[1].seen[-1].sampling.min_p) == (7, 0.25)
    assert CompletionRequest(model="m", prompt="a", temperature=1.0, top_k=-1).sampling().top_k == 0


def test_one_choice_that_fails_fails_the_request_and_ends_the_others(serve) -> None:
    url, engine = serve(room=2)
    body = {"model": MODEL, "prompt": ["a", "b", "c"], "max_tokens": 50, "ignore_eos": True}
    assert HTTP.post(f"{url}/v1/completions", json=body).status_code == 429
    assert engine.idle.wait(5)
    engine.room, engine.lost_after = 3, 2
    *_, last, nothing = HTTP.post(f"{url}/v1/completions", json=body | {"stream": True}).text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "service_unavailable"
    assert nothing == ""
    assert engine.idle.wait(5)
