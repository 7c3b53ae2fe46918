"""Text decoded in two parts equals the text decoded at once, wherever it is cut."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ov_phi3 import ChatTemplate, PromptError, Raw, Tokenizer

USER = [{"role": "user", "content": "Hi"}]
check = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)


@pytest.fixture(scope="module", params=["tiny_fp32", "demo_int4"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def phi3(tiny_fp32: Path) -> Tokenizer:
    return Tokenizer(tiny_fp32)


def reply_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids of a reply: any tokens, often single bytes and control tokens; not the header that a reply begins behind."""
    single = [i for i in range(min(tokenizer.vocab_size, 2000)) if len(tokenizer.token_bytes(i)) == 1]
    header = tokenizer.encode_messages(USER).tolist()[-3:]
    control = [i for i in tokenizer.control_tokens.values() if i not in header]
    token = st.integers(0, tokenizer.vocab_size - 1) | st.sampled_from(single) | st.sampled_from(control)
    return st.lists(token.filter(lambda i: i not in header), max_size=12)


@check
@given(data=st.data())
def test_any_cut_of_a_reply(tokenizer: Tokenizer, data: Any) -> None:
    prompt = tokenizer.encode_messages(USER).tolist()
    reply = data.draw(reply_ids(tokenizer))
    cut = data.draw(st.integers(0, len(reply)))
    first = tokenizer.decode(reply[:cut], after=prompt, final=False)
    rest = tokenizer.decode(reply[cut:], after=prompt + reply[:cut])
    assert first + rest == tokenizer.decode(reply) == tokenizer.decode(reply, after=prompt)


def test_a_space_stays_where_a_text_goes_on(phi3: Tokenizer) -> None:
    prompt, ids = phi3.encode_messages(USER).tolist(), phi3.encode("The capital of France").tolist()
    assert [phi3.decode(ids[2:], after=after) for after in ([], prompt, prompt + ids[:2])] == [
        "of France",
        "of France",
        " of France",
    ]
    # Behind a beginning of a text, which begins without a space, and behind any other text.
    assert phi3.decode(ids, after=[1]) == "The capital of France"
    assert phi3.decode(ids, after=phi3.encode(Raw("Say"))) == " The capital of France"


def test_an_emoji_is_cut(phi3: Tokenizer) -> None:
    ids = phi3.encode("a \U0001f999").tolist()[-4:]
    assert [phi3.decode(ids[:n]) for n in (1, 2, 3)] == ["\ufffd"] * 3
    assert [phi3.decode(ids[:n], final=False) for n in (1, 2, 3)] == [""] * 3
    assert [phi3.decode(ids[n:], after=ids[:n]) for n in (1, 2, 3)] == ["\U0001f999"] * 3


def test_a_template_whose_header_is_text(demo_int4: Path) -> None:
    """The header is known by what all prompts end with, whatever the template writes."""
    template = ChatTemplate("plain", header="{role}: ", end="\n", eos="")
    tokenizer = Tokenizer(demo_int4, template)
    prompt = tokenizer.encode_messages(USER)
    assert tokenizer.decode(prompt[-len(tokenizer._reply_header()) :]).endswith("assistant: ")
    assert tokenizer.stream_decoder(after=prompt).add([tokenizer.encode("x")[0]]) == "x"


def test_ids_outside_the_vocabulary(phi3: Tokenizer) -> None:
    with pytest.raises(PromptError, match="outside"):
        phi3.decode([5], after=np.array([phi3.vocab_size]))
