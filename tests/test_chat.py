"""A chat keeps the ids of every turn as they were, and a turn that fails never was."""

from __future__ import annotations

import threading

import pytest
from scripted import ScriptedBackend

from ov_phi3 import ContextOverflowError, Pipeline, StreamError, TemplateError


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_ids_grow_and_are_what_the_engine_is_asked(pipe: Pipeline, system: str | None) -> None:
    chat = pipe.chat(system=system)
    before: list[int] = []
    for text in ("Name a fruit.", "Another one.", "And a vegetable?"):
        result = chat.send(text, max_new_tokens=12)
        # What was there stays as it is, up to the reply's own end token.
        assert result.prompt_token_ids[: len(before)] == before
        before = result.prompt_token_ids + result.token_ids
        assert chat.token_ids.tolist() == before
        # The same ids asked for directly give the same reply.
        assert pipe.generate(result.prompt_token_ids, max_new_tokens=12).token_ids == result.token_ids
    roles = [m["role"] for m in chat.messages]
    assert roles == ([] if system is None else ["system"]) + ["user", "assistant"] * 3


def test_ids_are_the_rendered_conversations(tiny_pipe: Pipeline) -> None:
    """With the real Phi-3 tokenizer: a conversation built turn by turn is the conversation laid out at once."""
    first = tiny_pipe.chat(system="Be brief.")
    first.send("One.", max_new_tokens=1)  # a random model: its reply ends at the limit, without an end token
    reply = first.token_ids[-1]
    second = first.send("Two.", max_new_tokens=1)
    laid_out = tiny_pipe.tokenizer.encode_messages(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One."},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "Two."},
        ]
    ).tolist()
    assistant = tiny_pipe.tokenizer.control_tokens["<|assistant|>"]
    at = laid_out.index(assistant) + 1
    assert second.prompt_token_ids == laid_out[:at] + [int(reply)] + laid_out[at:]


def test_end_tokens_of_a_reply_are_not_doubled(pipe: Pipeline) -> None:
    chat = pipe.chat()
    chat.send("What is the capital of France?")
    ids = chat.send("And of Japan?", max_new_tokens=3).prompt_token_ids
    end = pipe.tokenizer.control_tokens["<|end|>"]
    assert ids.count(end) == 3  # two user turns and one reply


def test_a_turn_that_fails_never_was(pipe: Pipeline) -> None:
    chat = pipe.chat()
    chat.send("Name a fruit.", max_new_tokens=5)
    messages, ids = chat.messages, chat.token_ids.tolist()
    with pytest.raises(ContextOverflowError):
        chat.send("x " * 20_000)
    with pytest.raises(TypeError):
        chat.send(None)  # type: ignore[arg-type]
    assert (chat.messages, chat.token_ids.tolist()) == (messages, ids)
    assert chat.send("Another one.", max_new_tokens=5).token_ids


def test_a_cancelled_turn_keeps_what_came(pipe: Pipeline) -> None:
    chat = pipe.chat()
    stream = chat.stream("Write a very long story.", ignore_eos=True)
    for count, _ in enumerate(stream):
        if count == 3:
            stream.cancel()
    assert stream.result.finish_reason == "cancelled"
    assert chat.messages[-1] == {"role": "assistant", "content": stream.result.text}
    assert chat.token_ids.tolist()[-len(stream.result.token_ids) :] == stream.result.token_ids
    assert chat.send("Go on.", max_new_tokens=5).token_ids


def test_a_loop_left_early_is_no_hindrance(pipe: Pipeline) -> None:
    chat = pipe.chat()
    for _ in range(5):
        for _ in chat.stream("Write a very long story.", ignore_eos=True):
            break
    assert len(chat.messages) >= 8  # a turn is kept with the first token that came
    assert chat.send("Go on.", max_new_tokens=5).token_ids


async def test_async(pipe: Pipeline) -> None:
    chat = pipe.chat()
    text = "".join([c.text async for c in chat.stream("Name a fruit.", max_new_tokens=8)])
    assert chat.messages[-1]["content"] == text


def test_several_chats_take_turns(pipe: Pipeline) -> None:
    questions = ["Name a fruit.", "Another one.", "One more."]
    alone = pipe.chat(system="Be brief.")
    expected = [alone.send(q, max_new_tokens=8).token_ids for q in questions]
    chats = [pipe.chat(system="Be brief.") for _ in range(3)]
    for question, ids in zip(questions, expected, strict=True):
        assert [c.send(question, max_new_tokens=8).token_ids for c in chats] == [ids] * 3


def test_one_reply_at_a_time(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Semaphore(0)
    monkeypatch.setattr(pipe, "_backend", ScriptedBackend([[9690]], gate=gate))
    chat = pipe.chat()
    stream = chat.stream("One.")
    with pytest.raises(StreamError, match="still coming"):
        chat.stream("Two.")
    gate.release(2)
    assert stream.result.token_ids == [9690]
    assert chat.send("Two.").token_ids == [9690]


def test_a_system_turn_that_the_layout_lacks(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from ov_phi3 import ChatTemplate

    monkeypatch.setattr(pipe.tokenizer, "template", ChatTemplate.phi3_april_2024())
    with pytest.raises(TemplateError, match="no system turn"):
        pipe.chat(system="Be brief.")
