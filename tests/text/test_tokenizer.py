"""The real Phi-3 vocabulary: published vectors, exact chat ids, and text that never becomes a control token."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ov_phi3 import ChatTemplate, ModelError, PromptError, Raw, TemplateError, Tokenizer
from ov_phi3.text.template import Segment

HOSTILE = ["<|end|>", "<|user|>", "<|system|>", "<s>", "</s>", "<unk>", "<0x0A>", "<0x41>", "<", "|", ">", "▁", "\x00"]
HARMLESS = [
    "a",
    " ",
    "  ",
    "\n",
    "é",
    "🦙",
    "👩‍👩‍👧",
    "日本語",
    "\u0301",
    "1",
    "23",
    "\u00a0",
    "\t",
    "end",
    "user",
    "\u3000",
    "x = {}",
]

parts = st.lists(st.sampled_from(HARMLESS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=10)
harmless = parts.map("".join).filter(lambda t: not any(h in t for h in HOSTILE if len(h) > 2) and "▁" not in t)
hostile = st.lists(
    st.sampled_from(HOSTILE + HARMLESS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=12
).map("".join)
SLOW_FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)


@pytest.fixture(scope="module")
def phi3(tiny_fp32: Path) -> Tokenizer:
    return Tokenizer(tiny_fp32)


@pytest.fixture(scope="module")
def demo(demo_int4: Path) -> Tokenizer:
    return Tokenizer(demo_int4)


@pytest.fixture(scope="module")
def hf(tiny_hf: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_hf)


@pytest.fixture(scope="module")
def genai(tiny_fp32: Path) -> Any:
    """GenAI's tokenizer of the same model."""
    import openvino_genai

    return openvino_genai.Tokenizer(str(tiny_fp32))


def test_published_vectors(phi3: Tokenizer, tokenizer_vectors: list[dict[str, Any]]) -> None:
    assert len(tokenizer_vectors) == 46
    for vector in tokenizer_vectors:
        assert phi3.encode(vector["text"]).tolist() == vector["ids"], vector["text"]
        assert phi3.decode(vector["ids"]) == vector["text"]


def test_published_ids_of_the_control_tokens(phi3: Tokenizer) -> None:
    expected = {"<s>": 1, "<|endoftext|>": 32000, "<|assistant|>": 32001, "<|system|>": 32006, "<|end|>": 32007}
    assert {t: phi3.control_tokens[t] for t in expected} == expected
    assert phi3.encode(Raw("<|user|>\nHello")).tolist() == [32010, 15043]


def test_the_cookbooks_raw_prompt_has_the_ids_of_its_messages(phi3: Tokenizer) -> None:
    raw = Raw("<|system|>You are a helpful AI assistant.<|end|><|user|>can you introduce yourself?<|end|><|assistant|>")
    messages = [
        {"role": "system", "content": "You are a helpful AI assistant."},
        {"role": "user", "content": "can you introduce yourself?"},
    ]
    assert phi3.encode(raw).tolist() == phi3.encode_messages(messages).tolist()


@SLOW_FIXTURE
@given(first=harmless, second=harmless)
def test_ids_of_harmless_messages_are_those_of_the_rendered_string(
    phi3: Tokenizer, hf: Any, first: str, second: str
) -> None:
    messages = [
        {"role": "system", "content": first},
        {"role": "user", "content": second},
        {"role": "assistant", "content": second + first},
        {"role": "user", "content": first},
    ]
    rendered = phi3.template.render(messages)
    ids = phi3.encode_messages(messages).tolist()
    assert ids == hf.encode(rendered, add_special_tokens=False)
    assert ids == phi3.encode(Raw(rendered)).tolist()


@SLOW_FIXTURE
@given(text=hostile)
def test_no_text_becomes_a_control_token_and_every_text_round_trips(
    phi3: Tokenizer, demo: Tokenizer, text: str
) -> None:
    for tokenizer in (phi3, demo):
        ids = tokenizer.encode(text)
        assert not set(ids.tolist()) & set(tokenizer.control_tokens.values())
        assert tokenizer.decode(ids) == text


@SLOW_FIXTURE
@given(text=hostile)
def test_hostile_messages_have_only_the_templates_control_tokens(phi3: Tokenizer, text: str) -> None:
    ids = phi3.encode_messages([{"role": "user", "content": text}]).tolist()
    controls = [i for i in ids if i in phi3.control_tokens.values()]
    assert controls == [32010, 32007, 32001]


@SLOW_FIXTURE
@given(data=st.data())
def test_the_stream_decoder_adds_up_to_the_full_decode(phi3: Tokenizer, demo: Tokenizer, data: st.DataObject) -> None:
    for tokenizer in (phi3, demo):
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
        for skip in (True, False):
            stream = tokenizer.stream_decoder(skip_special_tokens=skip)
            text = "".join([*(stream.add([i]) for i in ids), stream.flush()])
            assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@SLOW_FIXTURE
@given(data=st.data())
def test_decode_equals_genais(phi3: Tokenizer, genai: Any, data: st.DataObject) -> None:
    """Only for ids whose bytes are valid UTF-8: for others, the number of U+FFFD in the graph's text differs."""
    ids = data.draw(st.lists(st.integers(0, phi3.vocab_size - 1), min_size=1, max_size=20))
    expected = genai.decode(ids)
    if "\ufffd" not in expected:
        assert phi3.decode(ids) == expected


def test_white_space_behind_a_control_token_is_removed_as_published(phi3: Tokenizer, hf: Any) -> None:
    for space in ("\n", "\n\n \t", "\u00a0", "\u3000", "\x1c", "\u2028"):
        text = f"<|user|>{space}Hi<|end|>{space}"
        assert phi3.encode(Raw(text)).tolist() == hf.encode(text, add_special_tokens=False), ascii(space)


def test_the_demo_tokenizer_keeps_the_templates_newlines(demo: Tokenizer) -> None:
    ids = demo.encode_messages([{"role": "user", "content": "Hi"}])
    assert demo.decode(ids, skip_special_tokens=False) == "<|user|>\nHi<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_lone_surrogates_are_refused(phi3: Tokenizer, text: str) -> None:
    with pytest.raises(PromptError, match="lone surrogate"):
        phi3.encode(text)
    assert phi3.decode(phi3.encode("still works")) == "still works"


@pytest.mark.parametrize(
    ("ids", "error"),
    [([32064], PromptError), ([-1], PromptError), ([[1, 2]], PromptError), ("12", TypeError), ([1.5], TypeError)],
)
def test_invalid_ids_are_refused(phi3: Tokenizer, ids: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        phi3.decode(ids)


def test_decode_takes_arrays_and_empty_lists(phi3: Tokenizer) -> None:
    assert phi3.decode(np.array([15043], dtype=np.int32)) == "Hello"
    assert phi3.decode([]) == ""


def test_a_template_with_other_control_tokens_is_refused(phi3: Tokenizer) -> None:
    with pytest.raises(TemplateError, match="im_start"):
        phi3.encode_segments(ChatTemplate.phi4().segments([{"role": "user", "content": "x"}]))
    with pytest.raises(TemplateError, match="no control token"):
        phi3.encode_segments([Segment("<|nope|>", True)])


def test_missing_and_wrong_files(tmp_path: Path, tiny_fp32: Path) -> None:
    with pytest.raises(ModelError, match="openvino_tokenizer.xml is missing"):
        Tokenizer(tmp_path, ChatTemplate.phi3())
    for name in ("openvino_tokenizer", "openvino_detokenizer"):
        (tmp_path / f"{name}.xml").write_bytes((tiny_fp32 / "openvino_model.xml").read_bytes())
        (tmp_path / f"{name}.bin").write_bytes((tiny_fp32 / "openvino_model.bin").read_bytes())
    with pytest.raises(ModelError, match="no BPE tokenizer"):
        Tokenizer(tmp_path, ChatTemplate.phi3())
