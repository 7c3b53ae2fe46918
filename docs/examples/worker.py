"""Replies from a process of its own: `python worker.py MODEL`."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import ov_phi3

pipe: ov_phi3.Pipeline


def start(model: str) -> None:
    """Load the model once, in the worker."""
    global pipe
    pipe = ov_phi3.load(model)


def reply(prompt: str) -> str:
    """Answer in the worker; only text crosses the border of the process."""
    return pipe.generate(prompt, max_new_tokens=64).text


if __name__ == "__main__":
    # "spawn": a forked process would have none of OpenVINO's threads.
    spawn = get_context("spawn")
    questions = ["What is the capital of France?", "What is the capital of Japan?"]
    with ProcessPoolExecutor(1, spawn, start, (sys.argv[1],)) as pool:
        for text in pool.map(reply, questions):
            print(text)
