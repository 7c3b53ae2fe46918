"""Random prompts for measurements."""

from __future__ import annotations

import random

import ov_phi3
from ov_phi3 import Pipeline


def test_a_random_prompt_has_the_exact_length_fresh_content_and_no_control_tokens(
    pipe: Pipeline, tiny_pipe: Pipeline
) -> None:
    for loaded in (pipe, tiny_pipe):
        one, two = (ov_phi3.random_prompt(loaded, 500, random.Random(seed)) for seed in (1, 2))
        assert len(one) == len(two) == 500
        assert one != two
        assert not set(one) & set(loaded.tokenizer.control_tokens.values())
        assert ov_phi3.random_prompt(loaded, 500, random.Random(1)) == one
