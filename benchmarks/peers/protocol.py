"""The protocol between `compare.py` and a peer: JSON lines to a process in an environment of its own.

Standard library only, since every peer has a different environment. A peer loads a model and generates; requests, time
stamps and conversations are the same code for all peers. A peer with files of its own has a method `traffic`: the bytes
that a token reads of these files, and the bytes of KV cache for each token before it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, Protocol

__all__ = ["Peer", "Stamp", "serve"]

Stamp = Callable[[Sequence[int]], None]
"""Called with the new ids of each step as soon as the caller of the peer's own API has them."""


class Peer(Protocol):
    """One runtime.

    Attributes:
        modules: the modules that a user imports.
        packages: the distributions whose versions are reported.
    """

    modules: Sequence[str]
    packages: Sequence[str]

    def load(self, options: dict[str, Any]) -> None:
        """Load the model at `options["model"]` on `options["device"]` with `options["threads"]` threads."""

    def generate(self, ids: list[int], new_tokens: int, stamp: Stamp) -> None:
        """Generate exactly `new_tokens` ids greedily, and ignore end tokens."""


class _Clock:
    """Time stamps of all ids, milliseconds since the request."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.times: list[float] = []
        self._started = time.perf_counter()

    def __call__(self, ids: Sequence[int]) -> None:
        now = (time.perf_counter() - self._started) * 1000.0
        self.ids += [int(i) for i in ids]
        self.times += [now] * len(ids)

    def report(self, prompt_tokens: int) -> dict[str, Any]:
        return {"prompt_tokens": prompt_tokens, "ids": self.ids, "token_ms": self.times}


def serve(peer: Peer) -> None:
    """Answer requests on standard input until it ends."""
    # Native libraries print to standard output; keep that apart from our lines.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = _answer(peer, json.loads(line))
        except Exception as error:  # noqa: BLE001 - report any exception of the peer's library
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _answer(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    kind = request.pop("do")
    if kind == "load":
        return _load(peer, request)
    if kind == "reply":
        return _reply(peer, request["ids"], request["new_tokens"])
    if kind == "chat":
        return {"turns": _chat(peer, request["turns"], request["new_tokens"])}
    if kind == "memory":
        return {"peak_bytes": _peak_bytes()}
    if kind == "traffic":
        # Peers that run the exported files have none: what a token reads of them is counted in the caller.
        return peer.traffic() if hasattr(peer, "traffic") else {}
    raise ValueError(f"unknown request {kind!r}")


def _load(peer: Peer, options: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    for name in peer.modules:
        importlib.import_module(name)
    imported = time.perf_counter()
    peer.load(options)
    loaded = time.perf_counter()
    return {
        "import_ms": (imported - started) * 1000.0,
        "load_ms": (loaded - imported) * 1000.0,
        "versions": {name: metadata.version(name) for name in peer.packages},
    }


def _reply(peer: Peer, ids: list[int], new_tokens: int) -> dict[str, Any]:
    clock = _Clock()
    peer.generate(ids, new_tokens, clock)
    return clock.report(len(ids))


def _chat(peer: Peer, turns: list[list[int]], new_tokens: int) -> list[dict[str, Any]]:
    """Run a conversation by ids: the prompt of a turn is all ids so far, generated replies included, and its own."""
    ids: list[int] = []
    replies = []
    for turn in turns:
        ids += turn
        reply = _reply(peer, list(ids), new_tokens)
        replies.append(reply)
        ids += reply["ids"]
    return replies


def _peak_bytes() -> int | None:
    """Peak resident memory of this process; None where the system does not report it."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
