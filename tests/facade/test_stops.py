"""Stop strings of samples and beams, and stop strings that are control tokens."""

from __future__ import annotations

from typing import Any

import pytest

from ov_phi3 import ConfigError, Pipeline

QUESTION = "What is the capital of France?"
SAMPLES: dict[str, Any] = {"num_return_sequences": 3, "temperature": 1.0, "seed": 1}


def test_samples_end_at_their_stop_strings(loop: Pipeline) -> None:
    free = loop.generate(QUESTION, max_new_tokens=24, ignore_eos=True, **SAMPLES)
    result = loop.generate(QUESTION, max_new_tokens=24, ignore_eos=True, stop=["capital"], **SAMPLES)
    whole = {tuple(reply.token_ids) for reply in free.alternatives}
    stopped = [reply for reply in result.alternatives if "capital" not in reply.text and reply.finish_reason == "stop"]
    assert stopped
    for reply in stopped:
        text = loop.tokenizer.decode(reply.token_ids)
        assert text.startswith(reply.text + "capital")
        # Nothing was computed behind the token that completes the stop string.
        assert "capital" not in loop.tokenizer.decode(reply.token_ids[:-1])
        assert any(ids[: len(reply.token_ids)] == tuple(reply.token_ids) for ids in whole)


def test_beams_end_at_their_stop_strings(loop: Pipeline) -> None:
    result = loop.generate(QUESTION, num_beams=3, num_return_sequences=3, stop=["France"], max_new_tokens=24)
    for reply in result.alternatives:
        text = loop.tokenizer.decode(reply.token_ids)
        assert "France" not in loop.tokenizer.decode(reply.token_ids[:-1])
        assert ("France" in text) == (reply.finish_reason == "stop" and text != reply.text)
    assert (result.text, result.stop_string) == ("The capital of ", "France")
    kept = loop.generate(QUESTION, num_beams=3, stop=["France"], include_stop=True, max_new_tokens=24)
    assert kept.text == "The capital of France"


def test_beams_are_ranked_by_what_they_return(loop: Pipeline) -> None:
    """The score of a beam is that of its own ids, up to the stop string."""
    result = loop.generate(QUESTION, num_beams=2, num_return_sequences=2, stop=["France"], max_new_tokens=12)
    prompt = result.prompt_token_ids
    for reply in result.alternatives:
        score = loop.score(prompt, reply.token_ids)
        assert reply.score == pytest.approx(score.total / len(reply.token_ids), abs=1e-3)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "temperature": 1.0}])
def test_the_other_backend_refuses_them(tiny_pipe: Pipeline, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"stop=\('x',\) with num_.*infer_request"):
        tiny_pipe.generate("Hi", stop=["x"], max_new_tokens=2, **options)


@pytest.mark.parametrize("several", [{}, SAMPLES])
def test_a_control_token_is_a_stop_id(tiny_loop: Pipeline, several: dict[str, Any]) -> None:
    user = tiny_loop.tokenizer.control_tokens["<|user|>"]
    prompt = len(tiny_loop.encode(QUESTION))

    def third(ids: Any, logits: Any) -> Any:
        if len(ids) == prompt + 2:
            logits[user] = 1000.0
        return logits

    options: dict[str, Any] = {"stop": ["<|user|>"], "logits_processors": [third], "max_new_tokens": 8, **several}
    result = tiny_loop.generate(QUESTION, **options)
    assert (len(result.token_ids), result.token_ids[-1]) == (3, user)
    assert (result.finish_reason, result.stop_string) == ("stop", "<|user|>")
    assert result.text == tiny_loop.tokenizer.decode(result.token_ids)
    shown = tiny_loop.generate(QUESTION, include_stop=True, **options)
    assert shown.text == result.text + "<|user|>"


def test_a_chat_does_not_keep_the_control_token(tiny_loop: Pipeline) -> None:
    user = tiny_loop.tokenizer.control_tokens["<|user|>"]
    chat = tiny_loop.chat()
    result = chat.send(QUESTION, stop="<|user|>", logit_bias={user: 1000.0}, min_new_tokens=2, max_new_tokens=8)
    assert result.token_ids[-1] == user
    assert chat.token_ids.tolist() == result.prompt_token_ids + result.token_ids[:-1]


def test_the_name_of_a_control_token_as_text_is_a_stop_string_too(tiny_loop: Pipeline) -> None:
    spelt = tiny_loop.tokenizer.encode("a <|user|> b").tolist()
    prompt = len(tiny_loop.encode(QUESTION))

    def spell(ids: Any, logits: Any) -> Any:
        logits[spelt[len(ids) - prompt]] = 1000.0
        return logits

    result = tiny_loop.generate(QUESTION, stop=["<|user|>"], logits_processors=[spell], max_new_tokens=len(spelt))
    assert (result.text, result.stop_string, result.finish_reason) == ("a ", "<|user|>", "stop")
