"""OpenAI's own client, unmodified, against a real `ov-phi3 serve` process."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

import ov_phi3

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def ask(client: Any, **options: Any) -> Any:
    options = {"model": "phi-3", "messages": QUESTION, "max_tokens": 12, "temperature": 0, **options}
    return client.chat.completions.create(**options)


def test_a_chat_is_the_librarys_reply(openai_client: Any, loop: ov_phi3.Pipeline) -> None:
    reply = ask(openai_client)
    expected = loop.generate(QUESTION, max_new_tokens=12, temperature=0)
    choice = reply.choices[0]
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(expected.prompt_token_ids), len(expected.token_ids))
    again = ask(openai_client).usage
    assert again.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1
    assert ask(openai_client, max_tokens=2).choices[0].finish_reason == "length"
    assert [model.id for model in openai_client.models.list()] == ["phi-3"]
    assert openai_client.models.retrieve("phi-3").id == "phi-3"


def test_a_stream_adds_up_to_the_reply(openai_client: Any) -> None:
    whole = ask(openai_client, logprobs=True, n=2)
    events = list(ask(openai_client, logprobs=True, n=2, stream=True, stream_options={"include_usage": True}))
    assert events[-1].choices == []
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens
    for at, choice in enumerate(whole.choices):
        mine = [event.choices[0] for event in events[:-1] if event.choices[0].index == at]
        assert mine[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in mine) == choice.message.content
        assert [one.finish_reason for one in mine if one.finish_reason] == [choice.finish_reason]
        tokens = [entry.token for one in mine if one.logprobs for entry in one.logprobs.content]
        assert tokens == [entry.token for entry in choice.logprobs.content]


def test_log_probabilities(openai_client: Any) -> None:
    content = ask(openai_client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    text = ask(openai_client).choices[0].message.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == text
    assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in content)
    assert all(entry.top_logprobs[0].token == entry.token for entry in content)  # greedy


def test_several_choices_with_a_seed_are_reproducible_and_differ(openai_client: Any) -> None:
    def texts(**options: Any) -> list[str]:
        reply = ask(openai_client, temperature=2.0, seed=3, **options)
        return [choice.message.content for choice in reply.choices]

    three = texts(n=3)
    assert len(set(three)) == 3
    assert texts(n=3) == three
    assert texts() == three[:1]


def test_stop_bias_and_structures(openai_client: Any, loop: ov_phi3.Pipeline) -> None:
    stopped = ask(openai_client, stop=["France"]).choices[0]
    assert (stopped.finish_reason, "France" in stopped.message.content) == ("stop", False)
    token = ask(openai_client, max_tokens=1).choices[0].message.content
    banned = loop.generate(QUESTION, max_new_tokens=1, temperature=0).token_ids[0]
    assert ask(openai_client, max_tokens=1, logit_bias={str(banned): -100}).choices[0].message.content != token
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    shape = {"type": "json_schema", "json_schema": {"name": "s", "schema": {**schema, "additionalProperties": False}}}
    reply = ask(openai_client, response_format=shape, max_tokens=40).choices[0].message.content
    assert isinstance(json.loads(reply)["ok"], bool)
    reply = ask(openai_client, extra_body={"regex": "[ab]{3}"}).choices[0].message.content
    assert set(reply) <= {"a", "b"} and len(reply) == 3  # noqa: PT018


def test_text_completions(openai_client: Any, loop: ov_phi3.Pipeline) -> None:
    def complete(**options: Any) -> Any:
        return openai_client.completions.create(**{"model": "phi-3", "max_tokens": 5, "temperature": 0, **options})

    prompt = "The capital of France is"
    ids = loop.tokenizer.encode(prompt).tolist()
    expected = loop.generate(ids, max_new_tokens=5, temperature=0).text
    assert complete(prompt=prompt).choices[0].text == complete(prompt=ids).choices[0].text == expected
    both = complete(prompt=[prompt, "Hi"], echo=True, logprobs=2)
    assert [choice.index for choice in both.choices] == [0, 1]
    first = both.choices[0]
    assert first.text == prompt + expected
    assert [
        first.text[at:].startswith(t) for at, t in zip(first.logprobs.text_offset, first.logprobs.tokens, strict=True)
    ]
    events = list(complete(prompt=prompt, echo=True, stream=True))
    assert "".join(event.choices[0].text for event in events) == first.text
    assert events[-1].choices[0].finish_reason == "length"
    control = complete(prompt="a <|end|> b", echo=True, max_tokens=1).usage.prompt_tokens
    assert control == len(loop.tokenizer.encode("a <|end|> b"))  # text is data here, too


@pytest.mark.parametrize(
    ("options", "kind", "word"),
    [
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "context window"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"n": 100}, openai.BadRequestError, "at most 72"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "nobody", "content": "a"}]}, openai.BadRequestError, "nobody"),
        ({"model": "gpt-4o"}, openai.NotFoundError, "gpt-4o"),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, "'x'"),
        ({"top_logprobs": 2}, openai.BadRequestError, "logprobs"),
        ({"response_format": {"type": "yaml"}}, openai.BadRequestError, "yaml"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}},
            openai.BadRequestError,
            "schema",
        ),
        ({"extra_body": {"num_beams": 4}}, openai.BadRequestError, "beam"),
        ({"extra_body": {"logits_processors": ["f"]}}, openai.BadRequestError, "functions"),
        ({"messages": [{"role": "user", "content": "x" * 200_000}]}, openai.APIStatusError, "larger"),
    ],
)
def test_errors_have_openais_shape(
    openai_client: Any, options: dict[str, Any], kind: type[Exception], word: str
) -> None:
    for streamed in (False, True):
        with pytest.raises(kind) as caught:
            ask(openai_client, stream=streamed, **options)
        error: Any = caught.value
        assert set(error.body) == {"message", "type", "param", "code"}
        assert word in error.body["message"]


def test_the_key_is_asked_for(server: Any) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
