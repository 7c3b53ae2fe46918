"""Prompts and chat messages with fresh random content, so that no prefix cache holds them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ov_phi3.pipeline import Pipeline

__all__ = ["chat_message", "random_prompt"]


def random_prompt(pipe: Pipeline, tokens: int, rng: random.Random) -> list[int]:
    """A prompt of `tokens` random ordinary tokens, without control tokens."""
    control_tokens = set(pipe.tokenizer.control_tokens.values())
    size = min(pipe.info.vocab_size, pipe.tokenizer.vocab_size)
    ids: list[int] = []
    while len(ids) < tokens:
        ids += [i for i in rng.choices(range(size), k=tokens - len(ids)) if i not in control_tokens]
    return ids


def chat_message(rng: random.Random, words: int = 5) -> str:
    """A random message; its numbers have two digits, so that all messages of `words` words have equal token counts."""
    return "Remember these: " + " ".join(str(rng.randrange(10, 100)) for _ in range(words))
