"""Random hostile strings and values of any type."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np

FRAGMENTS = (
    "",
    " ",
    "\n",
    "\0",
    "a",
    "<|end|>",
    "<|system|>",
    "<|user|>\n",
    "<|assistant|>",
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<0x0A>",
    "▁",
    "\ud800",
    "\udfff",
    "\U0001f9d1\u200d\U0001f680",
    "e\u0301" * 3,
    "\u202e",
    "\ufeff",
    "{{ 7 * 7 }}",
    "%s%n",
    "../../etc/passwd",
    "'; DROP TABLE users; --",
    "x" * 300,
    "\r\n\t\v\f",
    "\u2028",
    "\x7f\x80\x9f",
)
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**400,
    0.0,
    -0.0,
    0.5,
    1.5,
    1e-300,
    1e300,
    math.inf,
    -math.inf,
    math.nan,
    "",
    "0",
    "1",
    "stop",
    b"x",
    [],
    [0],
    [-1],
    [1.5],
    ["a", ""],
    (),
    {},
    {"a": 1},
    {1: 2.0},
    {1: math.nan},
    set(),
    object(),
    int,
    np.float32(0.5),
    np.int64(3),
    np.array([1, 2]),
    1j,
)


def text(rng: random.Random) -> str:
    """A string of fragments that are known to break software."""
    string = "".join(rng.choice(FRAGMENTS) for _ in range(rng.randrange(6)))
    if rng.random() < 0.3:
        string += "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(20)))
    return string


def odd(rng: random.Random, depth: int = 2) -> Any:
    """A value of any type."""
    choice = rng.random()
    if choice < 0.15:
        return text(rng)
    if choice < 0.25 and depth:
        return [odd(rng, depth - 1) for _ in range(rng.randrange(4))]
    if choice < 0.35 and depth:
        return {text(rng): odd(rng, depth - 1) for _ in range(rng.randrange(3))}
    return rng.choice(ODD)
