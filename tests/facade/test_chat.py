"""A chat keeps the exact ids of every turn, and a failed turn leaves it as it was."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reference import Reference
from scripted import WORD, MakePipe, ScriptedBackend

import ov_phi3
from ov_phi3 import (
    Chat,
    ConfigError,
    ContextOverflowError,
    GenerationError,
    GenerationResult,
    Pipeline,
    StreamError,
    TemplateError,
)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_ids_grow_and_equal_the_prompts(pipe: Pipeline, system: str | None) -> None:
    chat = pipe.chat(system=system)
    before: list[int] = []
    for text in ("Name a fruit.", "Another one.", "And a vegetable?"):
        result = chat.send(text, max_new_tokens=12)
        # The earlier ids stay, up to the reply's own end token.
        assert result.prompt_token_ids[: len(before)] == before
        before = result.prompt_token_ids + result.token_ids
        assert chat.token_ids.tolist() == before
        # The same ids as a prompt give the same reply.
        assert pipe.generate(result.prompt_token_ids, max_new_tokens=12).token_ids == result.token_ids
    roles = [m["role"] for m in chat.messages]
    assert roles == ([] if system is None else ["system"]) + ["user", "assistant"] * 3


def test_ids_equal_the_rendered_conversations(tiny_pipe: Pipeline) -> None:
    """With the real Phi-3 tokenizer: a conversation built turn by turn has the ids of one rendered at once."""
    first = tiny_pipe.chat(system="Be brief.")
    first.send("One.", max_new_tokens=1)  # a random model: its reply ends at the limit, without an end token
    reply = first.token_ids[-1]
    second = first.send("Two.", max_new_tokens=1)
    rendered = tiny_pipe.tokenizer.encode_messages(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One."},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "Two."},
        ]
    ).tolist()
    assistant = tiny_pipe.tokenizer.control_tokens["<|assistant|>"]
    at = rendered.index(assistant) + 1
    assert second.prompt_token_ids == rendered[:at] + [int(reply)] + rendered[at:]


def test_end_tokens_of_a_reply_are_not_doubled(pipe: Pipeline) -> None:
    chat = pipe.chat()
    chat.send("What is the capital of France?")
    ids = chat.send("And of Japan?", max_new_tokens=3).prompt_token_ids
    end = pipe.tokenizer.control_tokens["<|end|>"]
    assert ids.count(end) == 3  # two user turns and one reply


def test_a_failed_turn_leaves_the_chat_as_it_was(pipe: Pipeline) -> None:
    chat = pipe.chat()
    chat.send("Name a fruit.", max_new_tokens=5)
    messages, ids = chat.messages, chat.token_ids.tolist()
    with pytest.raises(ContextOverflowError):
        chat.send("x " * 20_000)
    with pytest.raises(TypeError):
        chat.send(None)  # type: ignore[arg-type]
    assert (chat.messages, chat.token_ids.tolist()) == (messages, ids)
    assert chat.send("Another one.", max_new_tokens=5).token_ids


def test_a_cancelled_turn_keeps_its_part_of_the_reply(pipe: Pipeline) -> None:
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


def test_one_reply_at_a_time(make: MakePipe) -> None:
    gate = threading.Semaphore(0)
    pipe, _ = make([[WORD]], gate=gate)
    chat = pipe.chat()
    stream = chat.stream("One.")
    with pytest.raises(StreamError, match="still coming"):
        chat.stream("Two.")
    gate.release(2)
    assert stream.result.token_ids == [WORD]
    assert chat.send("Two.").token_ids == [WORD]


def test_a_system_message_that_the_template_lacks(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from ov_phi3 import ChatTemplate

    monkeypatch.setattr(pipe.tokenizer, "template", ChatTemplate.phi3_april_2024())
    with pytest.raises(TemplateError, match="no system message"):
        pipe.chat(system="Be brief.")


# -- reuse ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact(demo_fp32: Path, device: str) -> Iterator[Pipeline]:
    """The demo model in float32, for what is held against the reference."""
    with ov_phi3.load(demo_fp32, device=device) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def reference(demo_hf: Path) -> Reference:
    return Reference(demo_hf)


def turn(chat: Chat, text: str, reference: Reference | None = None, **options: Any) -> GenerationResult:
    """One greedy turn, with checks: the prompt begins with the conversation, at most one block more than the new tokens
    is prefilled, and the reply equals the reference's.
    """
    before = chat.token_ids.tolist()
    result = chat.send(text, **{"max_new_tokens": 16, "do_sample": False, **options})
    prompt, reused = result.prompt_token_ids, result.metrics.reused_tokens
    assert reused is not None
    if before:
        common = before if before[-1] == prompt[len(before) - 1] else before[:-1]
        assert prompt[: len(common)] == common
        assert len(prompt) - reused <= len(prompt) - len(common) + 32
    if reference is not None:
        assert reference.differences(prompt, result.token_ids) == []
    assert chat.kv.reused_tokens == reused
    return result


def test_ten_turns_cost_their_new_tokens_only(exact: Pipeline, reference: Reference) -> None:
    chat = exact.chat(system="You are a helpful AI assistant. Answer briefly.")
    turn(chat, "What is the capital of France?", reference)
    for number in range(2, 11):
        turn(chat, f"And what about country number {number}?", reference)
        usage = chat.kv
        assert usage.cached_tokens == len(chat.token_ids) - 1  # the last one was never fed back
        assert usage.free_tokens == usage.context_length - len(chat.token_ids)
        assert usage.bytes == usage.cached_tokens * 2 * exact.info.kv_bytes_per_token  # float32


def test_after_a_rewind(exact: Pipeline, reference: Reference) -> None:
    chat = exact.chat(system="Be brief.")
    states = [(chat.messages, chat.token_ids.tolist())]
    for text in ("Name a fruit.", "Another one.", "And a vegetable?", "And a fish?"):
        turn(chat, text, reference)
        states.append((chat.messages, chat.token_ids.tolist()))
    chat.rewind(2)
    assert (chat.messages, chat.token_ids.tolist()) == states[2]
    turn(chat, "And a flower?", reference)
    chat.rewind()
    assert (chat.messages, chat.token_ids.tolist()) == states[2]
    chat.rewind(0)
    chat.rewind(turns=2)
    assert (chat.messages, chat.token_ids.tolist()) == states[0]
    turn(chat, "Name a river.", reference)
    with pytest.raises(ConfigError, match=r"turns=2; expected 0 to 1"):
        chat.rewind(2)
    with pytest.raises(ConfigError, match="expected 0 to 1"):
        chat.rewind(-1)
    with pytest.raises(TypeError, match="whole number"):
        chat.rewind("all")  # type: ignore[arg-type]


def test_both_branches_of_a_fork(exact: Pipeline, reference: Reference) -> None:
    chat = exact.chat(system="Be brief.", overflow="drop_oldest", on_cancel="drop")
    turn(chat, "Name a fruit.", reference)
    branch = chat.fork()
    assert (branch.overflow, branch.on_cancel) == ("drop_oldest", "drop")
    assert (branch.messages, branch.token_ids.tolist()) == (chat.messages, chat.token_ids.tolist())
    turn(branch, "Why that one?", reference)
    turn(chat, "Name a colour.", reference)
    turn(branch, "And what else?", reference)
    turn(chat, "And another one?", reference)
    assert len(branch.messages) == len(chat.messages) == 7
    assert branch.messages[3:] != chat.messages[3:]


def test_three_chats_in_random_order(exact: Pipeline, reference: Reference) -> None:
    draw = random.Random(5)
    chats = [exact.chat(system=system) for system in (None, "Be brief.", "Be brief and kind.")]
    for number in range(12):
        turn(draw.choice(chats), f"Tell me about the number {number}.", reference)


def test_a_sampled_reply_is_kept_as_it_was_generated(pipe: Pipeline) -> None:
    """Random ids decode to text that other ids encode: the ids must come from the reply."""
    chat = pipe.chat()
    for seed in range(4):
        turn(chat, "Write something.", do_sample=True, temperature=5.0, seed=seed, ignore_eos=True)
    assert pipe.tokenizer.encode_messages(chat.messages).tolist() != chat.token_ids.tolist()


# -- cancelling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_turn", [False, True])
def test_a_cancelled_turn_can_be_dropped(pipe: Pipeline, by_turn: bool) -> None:
    chat = pipe.chat() if by_turn else pipe.chat(on_cancel="drop")
    chat.send("Name a fruit.", max_new_tokens=5)
    before = (chat.messages, chat.token_ids.tolist())
    stream = chat.stream("Write a long story.", ignore_eos=True, on_cancel="drop" if by_turn else None)
    for count, _ in enumerate(stream):
        if count == 3:
            stream.cancel()
    assert stream.result.token_ids
    assert (chat.messages, chat.token_ids.tolist()) == before
    assert len(turn(chat, "Another one.").token_ids) > 1
    # A turn may choose otherwise than its chat.
    for _ in chat.stream("Write a long story.", ignore_eos=True, on_cancel="keep"):
        break
    chat.rewind(0)  # waits for the reply to end
    assert len(chat.messages) == 6


@pytest.mark.parametrize("name", ["overflow", "on_cancel"])
def test_unknown_policies(pipe: Pipeline, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}='keeep'; expected one of"):
        pipe.chat(**{name: "keeep"})
    with pytest.raises(ConfigError, match="on_cancel='x'"):
        pipe.chat().send("Hi", on_cancel="x")


# -- what fits -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(tiny_fp32: Path, device: str) -> Iterator[Pipeline]:
    with ov_phi3.load(tiny_fp32, device=device, context_length=512) as pipe:
        yield pipe


def test_two_hundred_turns_in_a_small_window(narrow: Pipeline, tiny_hf: Path) -> None:
    reference = Reference(tiny_hf)
    draw = random.Random(1)
    chat = narrow.chat(system="You are a helpful AI assistant.", overflow="drop_oldest")
    system = chat.messages[0]
    head = narrow.tokenizer.encode_messages([system, {"role": "user", "content": ""}]).tolist()
    said: list[dict[str, str]] = []
    dropped: list[dict[str, str]] = []
    prefilled = drops = 0
    for number in range(200):
        text = f"Tell me about number {number}: " + "really " * draw.randrange(0, 30)
        result = chat.send(text, max_new_tokens=24, do_sample=False)
        said += [{"role": "user", "content": text}, {"role": "assistant", "content": result.text}]
        dropped += result.dropped_messages
        drops += bool(result.dropped_messages)
        prefilled += len(result.prompt_token_ids) - (result.metrics.reused_tokens or 0)
        assert len(result.prompt_token_ids) + 24 <= 512
        assert chat.messages == [system, *said[len(dropped) :]]
        assert said[: len(dropped)] == dropped
        assert result.prompt_token_ids[:9] == head[:9]
        assert chat.token_ids.tolist() == result.prompt_token_ids + result.token_ids
        if number % 20 == 0 or (result.dropped_messages and drops < 10):
            assert reference.differences(result.prompt_token_ids, result.token_ids) == []
    assert chat.dropped_turns * 2 == len(dropped) > 200
    # Enough went at once: most turns found all that was before them.
    assert drops < 60
    assert prefilled < 200 * 140


def test_dropping_keeps_the_ids_of_what_stays(narrow: Pipeline) -> None:
    chat = narrow.chat(overflow="drop_oldest")
    replies = []
    for number in range(30):
        result = chat.send(f"Say something about {number}.", max_new_tokens=20, temperature=2.0, seed=number)
        replies.append(result.token_ids)
        if result.dropped_messages:
            break
    assert result.dropped_messages[0] == {"role": "user", "content": "Say something about 0."}
    kept = replies[chat.dropped_turns :]
    ids = result.prompt_token_ids + result.token_ids
    for reply in kept:
        body = reply[:-1] if reply[-1] in narrow.info.eos_token_ids else reply
        assert any(ids[i : i + len(body)] == body for i in range(len(ids)))
    assert ids == chat.token_ids.tolist()


@pytest.mark.parametrize("overflow", ["error", "drop_oldest"])
def test_a_message_that_can_never_fit(narrow: Pipeline, overflow: str) -> None:
    chat = narrow.chat(system="Be brief.", overflow=overflow)
    chat.send("Name a fruit.", max_new_tokens=8)
    before = (chat.messages, chat.token_ids.tolist(), chat.dropped_turns)
    for text, options, match in (
        ("really " * 600, {}, "window of 512 tokens"),
        ("Name a fruit.", {"max_new_tokens": 508}, "508"),
        ("really " * 400, {"max_new_tokens": 120}, "120"),
    ):
        with pytest.raises(ContextOverflowError, match=match) as caught:
            chat.send(text, **options)
        assert ("the new message takes" in str(caught.value)) == (overflow == "drop_oldest")
        assert caught.value.context_length == 512
        assert (chat.messages, chat.token_ids.tolist(), chat.dropped_turns) == before
    assert chat.send("Another one.", max_new_tokens=8).token_ids


def test_a_system_message_that_fills_the_window(narrow: Pipeline) -> None:
    with pytest.raises(ContextOverflowError, match="the system message takes"):
        narrow.chat(system="really " * 600)


def test_a_failed_turn_drops_nothing(narrow: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = narrow.chat(overflow="drop_oldest")
    while len(chat.token_ids) < 440:
        chat.send("Tell me about the sea. " * 4, max_new_tokens=24, ignore_eos=True)
    before = (chat.messages, chat.token_ids.tolist(), chat.dropped_turns)
    with monkeypatch.context() as patch:
        broken = ScriptedBackend([[5]], failure=RuntimeError("broken"))
        patch.setattr(narrow.engine.check_open(), "generate", broken.generate)
        with pytest.raises(GenerationError, match="broken"):
            chat.send("Tell me about the sea. " * 12, max_new_tokens=24)
    assert (chat.messages, chat.token_ids.tolist(), chat.dropped_turns) == before
    assert chat.send("Tell me about the sea. " * 12, max_new_tokens=24).dropped_messages


def test_progress_reaches_a_turn(exact: Pipeline) -> None:
    chat = exact.chat()
    seen: list[tuple[int, int]] = []
    first = chat.send("Name a fruit.", max_new_tokens=4, on_prefill=lambda *figures: seen.append(figures))
    total = first.metrics.prompt_tokens
    assert seen == [(first.metrics.reused_tokens, total), (total, total)]


async def test_async_turns_keep_their_reuse(exact: Pipeline, reference: Reference) -> None:
    chat = exact.chat(system="Be brief.")
    for text in ("Name a fruit.", "Another one."):
        before = len(chat.token_ids)
        result = await chat.stream(text, max_new_tokens=12, do_sample=False).aresult()
        assert (result.metrics.reused_tokens or 0) >= before - 33
        assert reference.differences(result.prompt_token_ids, result.token_ids) == []
