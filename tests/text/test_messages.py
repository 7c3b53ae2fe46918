"""Messages of OpenAI's chat API in one form; what has no meaning is left out, what is not a message is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from ov_phi3 import TemplateError, Tokenizer
from ov_phi3.text.messages import check_final, normalize

USER = {"role": "user", "content": "Hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}


@pytest.fixture(scope="module")
def phi3(tiny_fp32: Path) -> Tokenizer:
    return Tokenizer(tiny_fp32)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({**USER, "name": "Ada", "metadata": {"a": 1}, "id": 5, "context": "x"}, USER),
        ({"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be brief."}),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
        ({"role": "user", "content": ""}, ""),
        ({"role": "assistant", "content": None, "refusal": "No."}, "No."),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        # An answer of OpenAI's client as it writes itself.
        (
            {
                "content": "Yes.",
                "refusal": None,
                "role": "assistant",
                "annotations": [],
                "audio": None,
                "function_call": None,
                "tool_calls": None,
            },
            "Yes.",
        ),
        ({"role": "tool", "content": "5", "tool_call_id": "c1", "name": "f"}, ...),
        ({"role": "assistant", "content": "", "tool_calls": [CALL]}, [{"x": [1]}]),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}, [{"x": 1}]),
        ({"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}, [{}]),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}, ["{x"]),
    ],
)
def test_normal_form(message: dict[str, Any], expected: Any) -> None:
    (normal,) = normalize([message])
    if expected is ...:
        assert normal == message
    elif isinstance(expected, list):
        assert normal["content"] == ""
        assert [call["function"]["arguments"] for call in normal["tool_calls"]] == expected
        assert {call["function"]["name"] for call in normal["tool_calls"]} == {"f"}
    else:
        role = "system" if message["role"] == "developer" else message["role"]
        assert normal == (expected if isinstance(expected, dict) else {"role": role, "content": expected})
    assert normalize([normal]) == [normal]
    json.dumps(normal)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"content": "x"}, r"messages\[1\] has no 'role', but \['content'\]"),
        ({"rol": "user", "content": "x"}, "did you mean 'role'"),
        ({"role": "usr", "content": "x"}, "Did you mean 'user'"),
        ({"role": "function", "content": "x"}, "expected one of"),
        ({"role": None, "content": "x"}, "has the role None"),
        ({"role": "user"}, r"messages\[1\] has no 'content'"),
        ({"role": "user", "contnet": "x"}, "did you mean 'content'"),
        ({"role": "user", "content": None}, "content is None"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "content is None"),
        ({"role": "assistant", "content": "x", "tool_call": [CALL]}, "did you mean 'tool_calls'"),
        ({"role": "user", "content": 5}, "not int"),
        ({"role": "user", "content": b"x"}, "not bytes"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "content part"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}, "content part"),
        ({"role": "user", "content": ["x"]}, "content part"),
        ({"role": "assistant", "tool_calls": "f()"}, "must be a list"),
        ({"role": "assistant", "tool_calls": [{"name": "f"}]}, r"tool_calls\[0\] must be"),
        ({"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}, "'custom'"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}, "name must be a string"),
        ({"role": "tool", "content": "5", "tool_call_id": 5}, "tool_call_id must be a string"),
    ],
)
def test_what_is_no_message_is_named(message: dict[str, Any], error: str) -> None:
    with pytest.raises(TemplateError, match=error):
        normalize([USER, message])


def test_a_final_message_of_the_assistant_is_continued_or_refused() -> None:
    assistant = {"role": "assistant", "content": "The capital"}
    check_final(normalize([USER, assistant]), continue_final_message=True)
    check_final(normalize([USER]), continue_final_message=False)
    with pytest.raises(TemplateError, match=r"messages\[1\].*continue_final_message=True"):
        check_final(normalize([USER, assistant]), continue_final_message=False)
    with pytest.raises(TemplateError, match="role 'user'"):
        check_final(normalize([USER]), continue_final_message=True)
    with pytest.raises(TemplateError, match="tool_calls"):
        check_final(normalize([USER, {**assistant, "tool_calls": [CALL]}]), continue_final_message=True)


def test_the_ids_of_a_continued_message_end_with_its_text(phi3: Tokenizer) -> None:
    messages = [USER, {"role": "assistant", "content": "The capital"}]
    ids = phi3.encode_messages(messages, continue_final_message=True).tolist()
    assert ids == phi3.encode_messages([USER]).tolist() + phi3.encode("The capital").tolist()
    with pytest.raises(TemplateError, match="'user'"):
        phi3.encode_messages([USER], continue_final_message=True)
