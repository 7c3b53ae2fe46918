"""Options that only our own engine has, on the engine: what they promise holds for whole replies."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from ov_phi3 import ConfigError, GenerationConfig, GenerationError, Pipeline

PROMPT = "Count from one to ten, and again."
OPTIONS: list[dict[str, Any]] = [
    {"typical_p": 0.8},
    {"top_n_sigma": 1.0},
    {"xtc_probability": 0.5, "xtc_threshold": 0.05},
    {"dry_multiplier": 0.8},
    {"no_repeat_ngram_size": 2},
    {"bad_words": ["e"]},
    {"stop_on_loop": (4, 3)},
]


def cycle(*tokens: int) -> Any:
    """A processor that makes the reply a loop of these tokens."""

    def process(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        last = int(ids[-1])
        token = tokens[(tokens.index(last) + 1) % len(tokens)] if last in tokens else tokens[0]
        logits[token] = 1e4
        return logits

    return process


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_seeded_reply_is_the_same_beside_others(tiny_loop: Pipeline, options: dict[str, Any]) -> None:
    request = {"do_sample": True, "seed": 7, "max_new_tokens": 12, "ignore_eos": True, **options}
    alone = tiny_loop.generate(PROMPT, **request).token_ids
    with ThreadPoolExecutor(3) as pool:
        replies = [pool.submit(tiny_loop.generate, PROMPT, **{**request, "seed": 7 + i // 2}) for i in range(4)]
        ids = [reply.result().token_ids for reply in replies]
    assert ids[0] == ids[1] == alone
    assert ids[2] == ids[3]


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_bad_words_do_not_come_however_they_are_cut(tiny_loop: Pipeline, temperature: float) -> None:
    options: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 60, "ignore_eos": True, "seed": 1}
    plain = tiny_loop.generate(PROMPT, **options).text
    words = sorted({plain[at : at + 2] for at in range(0, 20, 2)} | {"e", " a"})
    for reply in tiny_loop.generate(PROMPT, **options, bad_words=words).text, plain:
        assert any(word in reply for word in words) == (reply is plain)


def test_bad_words_in_every_sample(tiny_loop: Pipeline) -> None:
    reply = tiny_loop.generate(
        PROMPT, num_return_sequences=3, temperature=2.0, seed=1, max_new_tokens=20, bad_words=["e", "a"]
    )
    assert len(reply.alternatives) == 3
    assert not any(letter in each.text for each in reply.alternatives for letter in "ea")


def test_no_ngram_comes_twice(tiny_loop: Pipeline) -> None:
    options: dict[str, Any] = {"logits_processors": [cycle(300, 301)], "max_new_tokens": 12, "ignore_eos": True}
    assert tiny_loop.generate(PROMPT, **options).token_ids == [300, 301] * 6
    reply = tiny_loop.generate(PROMPT, **options, no_repeat_ngram_size=2)
    ids = [*reply.prompt_token_ids, *reply.token_ids]
    pairs = list(itertools.pairwise(ids))[len(reply.prompt_token_ids) - 1 :]
    assert len(set(pairs)) == len(pairs)


class TestLoop:
    def test_ends_the_reply(self, tiny_loop: Pipeline) -> None:
        options: dict[str, Any] = {"logits_processors": [cycle(300, 301, 302)], "max_new_tokens": 50}
        reply = tiny_loop.generate(PROMPT, **options, stop_on_loop=(3, 4))
        assert reply.finish_reason == "loop"
        assert reply.token_ids == [300, 301, 302] * 4
        longer = tiny_loop.generate(PROMPT, **options, stop_on_loop=(3, 4), min_new_tokens=20)
        assert len(longer.token_ids) == 20
        assert tiny_loop.generate(PROMPT, **options, stop_on_loop=(2, 4)).finish_reason == "length"

    def test_ends_each_sample(self, tiny_loop: Pipeline) -> None:
        reply = tiny_loop.generate(
            PROMPT,
            num_return_sequences=2,
            do_sample=True,
            stop_on_loop=(1, 5),
            max_new_tokens=30,
            logits_processors=[cycle(300)],
        )
        assert [each.finish_reason for each in reply.alternatives] == ["loop"] * 2
        assert [each.token_ids for each in reply.alternatives] == [[300] * 5] * 2


def test_dry_ends_a_repetition(tiny_loop: Pipeline) -> None:
    def prefer(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        logits[300] += 50.0
        return logits

    options: dict[str, Any] = {"logits_processors": [prefer], "max_new_tokens": 12, "ignore_eos": True}
    assert tiny_loop.generate(PROMPT, **options).token_ids == [300] * 12
    varied = tiny_loop.generate(PROMPT, **options, dry_multiplier=5.0, dry_base=2.0).token_ids
    # A repetition of n tokens is lowered by 5 * 2 ** (n - 2): from 80 on it outweighs the 50.
    assert varied[:6] == [300] * 6
    assert set(varied[6:]) != {300}
    text = tiny_loop.tokenizer.decode([300]).strip()
    broken = tiny_loop.generate(PROMPT, **options, dry_multiplier=5.0, dry_base=2.0, dry_sequence_breakers=[text])
    assert broken.token_ids == [300] * 12


def test_nothing_left_names_the_options(tiny_loop: Pipeline) -> None:
    everything = [[token] for token in range(tiny_loop.info.vocab_size)]
    with pytest.raises(GenerationError, match=r"no token is left.*Look at bad_words, logit_bias"):
        tiny_loop.generate(PROMPT, max_new_tokens=3, bad_words=everything, logit_bias={1: 2.0})
    assert tiny_loop.generate(PROMPT, max_new_tokens=3).token_ids


def test_a_structure_and_bad_words(tiny_loop: Pipeline) -> None:
    reply = tiny_loop.generate(PROMPT, regex="(Paris|London)", bad_words=["Paris"], max_new_tokens=12)
    assert reply.text == "London"
    with pytest.raises(GenerationError, match="regex allows only tokens here that bad_words excludes"):
        tiny_loop.generate(PROMPT, regex="(Paris|London)", bad_words=["Par", "Lon"], max_new_tokens=12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_llm_pipeline_refuses_and_names_the_other(tiny_pipe: Pipeline, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))}.*infer_request"):
        tiny_pipe.generate(PROMPT, max_new_tokens=2, **options)


@pytest.mark.parametrize("options", [o for o in OPTIONS if "no_repeat_ngram_size" not in o], ids=str)
def test_beams_refuse_and_name_both(tiny_loop: Pipeline, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="num_beams=2") as caught:
        tiny_loop.generate(PROMPT, max_new_tokens=2, num_beams=2, **options)
    assert next(iter(options)) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"dry_base": 2.0}, "dry_multiplier"),
        ({"xtc_threshold": 0.2}, "xtc_probability"),
        ({"typical_p": 0}, "typical_p"),
        ({"typical_p": 0.5, "do_sample": False}, "do_sample=False"),
        ({"top_n_sigma": -1}, "top_n_sigma"),
        ({"xtc_probability": 1.5}, "xtc_probability"),
        ({"dry_multiplier": 1.0, "dry_base": 0.5}, "dry_base"),
        ({"dry_multiplier": 1.0, "dry_sequence_breakers": [""]}, "dry_sequence_breakers"),
        ({"stop_on_loop": (0, 2)}, "window"),
        ({"stop_on_loop": (2, 1)}, "repeats"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": [[]]}, "bad_words"),
        ({"bad_words": [[-1]]}, "bad_words"),
    ],
    ids=str,
)
def test_values_that_are_refused(options: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        GenerationConfig(**options)


def test_forms_that_are_taken() -> None:
    config = GenerationConfig(
        bad_words=["a", (1, 2), np.array([3]), "a"], stop_on_loop=[4, np.int64(3)], dry_multiplier=1.0
    )
    assert config.bad_words == ("a", (1, 2), (3,))
    assert config.stop_on_loop == (4, 3)
    assert hash(config) == hash(config.replace())
    assert GenerationConfig(bad_words="word").bad_words == ("word",)
    for wrong in ({"bad_words": 5}, {"bad_words": [5]}, {"stop_on_loop": 3}, {"stop_on_loop": (1, 2, 3)}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            GenerationConfig(**wrong)
