"""Every kind of prompt becomes token ids, through the chat template exactly once or not at all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ov_phi3 import PromptError, Raw, TemplateError, Tokenizer
from ov_phi3.text.prompt import as_messages, encode_prompt

USER = {"role": "user", "content": "Hi"}
VOCAB_SIZE = 32064


@pytest.fixture(scope="module")
def phi3(tiny_fp32: Path) -> Tokenizer:
    return Tokenizer(tiny_fp32)


def test_a_string_is_one_user_message(phi3: Tokenizer) -> None:
    assert as_messages("Hi") == [USER]
    ids = encode_prompt("Hi", phi3, VOCAB_SIZE)
    assert ids.tolist() == encode_prompt([USER], phi3, VOCAB_SIZE).tolist() == phi3.encode_messages([USER]).tolist()
    assert ids.dtype == np.int64


def test_raw_text_is_not_templated(phi3: Tokenizer) -> None:
    assert as_messages(Raw("Hi")) is None
    assert encode_prompt(Raw("<|user|>Hi"), phi3, VOCAB_SIZE).tolist() == [32010, *phi3.encode("Hi").tolist()]


@pytest.mark.parametrize("prompt", [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3], dtype=np.uint16)])
def test_token_ids_stay_as_they_are(phi3: Tokenizer, prompt: Any) -> None:
    assert as_messages(prompt) is None
    ids = encode_prompt(prompt, phi3, VOCAB_SIZE)
    assert (ids.tolist(), ids.dtype) == ([1, 2, 3], np.int64)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], PromptError, "prompt is empty"),
        (Raw(""), PromptError, "prompt is empty"),
        ([VOCAB_SIZE], PromptError, f"ids go from 0 to {VOCAB_SIZE - 1}"),
        ([{"role": "usr", "content": "Hi"}], TemplateError, "role 'usr'"),
        (USER, TypeError, "prompt is a dict"),
        (3, TypeError, "not int"),
        (None, TypeError, "not NoneType"),
    ],
)
def test_invalid_prompts_are_refused(phi3: Tokenizer, prompt: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encode_prompt(prompt, phi3, VOCAB_SIZE)
