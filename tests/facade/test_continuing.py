"""Replies that continue an assistant's message or an earlier reply, on both backends."""

from typing import Any

import pytest

from ov_phi3 import ConfigError, Pipeline, Raw, TemplateError

QUESTION = {"role": "user", "content": "What is the capital of France?"}
BEGUN = [QUESTION, {"role": "assistant", "content": "The capital"}]


def test_the_first_part_and_the_rest_are_the_whole(tiny: Pipeline) -> None:
    whole = tiny.generate([QUESTION], max_new_tokens=12)
    assert " " in whole.text
    for cut in range(1, 12):
        first = tiny.generate([QUESTION], max_new_tokens=cut)
        rest = tiny.generate(first.prompt_token_ids + first.token_ids, max_new_tokens=12 - cut)
        assert rest.token_ids == whole.token_ids[cut:]
        assert first.text + rest.text == whole.text


def test_a_cut_inside_a_character(tiny_loop: Pipeline) -> None:
    """The bytes that a cut reply ends with belong to its rest, in results, streams and samples."""
    wanted = tiny_loop.tokenizer.encode("a \U0001f999").tolist()[-4:]
    start = len(tiny_loop.encode([QUESTION]))

    def emoji(ids: Any, logits: Any) -> Any:
        logits[:] = -50.0
        logits[wanted[(len(ids) - start) % 4]] = 50.0
        return logits

    options: dict[str, Any] = {"logits_processors": [emoji]}
    for cut in range(1, 8):
        first = tiny_loop.generate([QUESTION], max_new_tokens=cut, **options)
        rest = tiny_loop.generate(first.prompt_token_ids + first.token_ids, max_new_tokens=8 - cut, **options)
        assert first.text + rest.text == "\U0001f999" * 2
        assert "".join(chunk.text for chunk in tiny_loop.stream([QUESTION], max_new_tokens=cut, **options)) == (
            first.text
        )
    samples = tiny_loop.generate([QUESTION], max_new_tokens=6, num_return_sequences=2, temperature=1.0, **options)
    assert [reply.text for reply in samples.alternatives] == ["\U0001f999"] * 2


def test_the_last_message_is_continued(demo: Pipeline) -> None:
    result = demo.generate(BEGUN, max_new_tokens=12, continue_final_message=True)
    assert result.text.startswith(" of France is Paris")  # what comes behind differs between processors
    stream = demo.stream(BEGUN, max_new_tokens=12, continue_final_message=True)
    assert "".join(chunk.text for chunk in stream) == result.text
    assert result.prompt_token_ids == demo.encode(BEGUN, continue_final_message=True).tolist()


def test_a_continued_message_with_the_real_tokenizer(tiny: Pipeline) -> None:
    """Its space stays, and its ids are those of the same prompt as raw text."""
    result = tiny.generate(BEGUN, max_new_tokens=6, continue_final_message=True)
    raw = Raw("<|user|>\nWhat is the capital of France?<|end|>\n<|assistant|>\nThe capital")
    assert result.prompt_token_ids == tiny.encode(raw).tolist()
    ids = tiny.tokenizer.encode("The capital").tolist() + result.token_ids
    assert "The capital" + result.text == tiny.tokenizer.decode(ids)


def test_a_continued_message_behind_a_prefix(tiny_loop: Pipeline) -> None:
    system = {"role": "system", "content": "Be brief."}
    prefix = tiny_loop.prefill([system])
    expected = tiny_loop.generate([system, *BEGUN], max_new_tokens=4, continue_final_message=True)
    for messages in ([system, *BEGUN], BEGUN):
        result = tiny_loop.generate(messages, prefix=prefix, max_new_tokens=4, continue_final_message=True)
        assert (result.prompt_token_ids, result.token_ids) == (expected.prompt_token_ids, expected.token_ids)


def test_tokens_are_counted_as_they_are_sent(tiny: Pipeline) -> None:
    assert tiny.count_tokens("Hi") == len(tiny.encode("Hi")) == 4
    assert tiny.count_tokens([1, 2, 3]) == 3
    assert tiny.count_tokens(BEGUN, continue_final_message=True) == len(tiny.encode([QUESTION])) + 2


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        (BEGUN, {}, TemplateError, r"messages\[1\].*continue_final_message=True"),
        ([QUESTION], {"continue_final_message": True}, TemplateError, "'user'"),
        ("Hi", {"continue_final_message": True}, TemplateError, "'user'"),
        ([1, 2], {"continue_final_message": True}, ConfigError, "list of messages"),
        (BEGUN, {"continue_final_message": 1}, TypeError, "True or False"),
        (["a", "b"], {}, TypeError, "list of strings.*generate_many"),
    ],
)
def test_what_cannot_be_continued(
    tiny: Pipeline, prompt: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    for call in (tiny.generate, tiny.stream, tiny.count_tokens):
        with pytest.raises(error, match=message):
            call(prompt, **options)
