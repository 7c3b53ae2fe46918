"""Questions that several test modules ask, with the options of the replies."""

from typing import Any

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40}
QUESTIONS = (
    "What is the capital of Japan?",
    "Name three fruits.",
    "Tell me about the sea.",
    "Hi",
    "Why is the sky blue?",
)
SYSTEM = "You are a helpful assistant who answers in one short sentence, politely, and never says more than was asked."
