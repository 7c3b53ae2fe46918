"""How `compare.py` talks to a runtime under test: lines of JSON, to a process in an environment of its own.

Standard library only, since every peer's environment is another. A peer loads a model and generates; the asking, the
stamps and the conversation are the same code for all of them.
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
"""To be called with each step's new ids as soon as the caller of the peer's own API has them."""


class Peer(Protocol):
    """One runtime.

    Attributes:
        modules: what its user imports.
        packages: the distributions whose versions are told.
    """

    modules: Sequence[str]
    packages: Sequence[str]

    def load(self, options: dict[str, Any]) -> None:
        """Load the model at `options["model"]` on `options["device"]` with `options["threads"]` threads."""

    def generate(self, ids: list[int], new_tokens: int, stamp: Stamp) -> None:
        """Greedy, exactly `new_tokens` ids, end tokens or not."""


class _Clock:
    """Takes the time of every id, from when the request is made."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.times: list[float] = []
        self._begun = time.perf_counter()

    def __call__(self, ids: Sequence[int]) -> None:
        now = (time.perf_counter() - self._begun) * 1000.0
        self.ids += [int(i) for i in ids]
        self.times += [now] * len(ids)

    def report(self, prompt_tokens: int) -> dict[str, Any]:
        return {"prompt_tokens": prompt_tokens, "ids": self.ids, "token_ms": self.times}


def serve(peer: Peer) -> None:
    """Answer requests on standard input until it ends."""
    # What native libraries print on standard output must not come between our lines.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = _answer(peer, json.loads(line))
        except Exception as error:  # noqa: BLE001 - whatever a peer's library raises is told, not lost
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
    raise ValueError(f"unknown request {kind!r}")


def _load(peer: Peer, options: dict[str, Any]) -> dict[str, Any]:
    begun = time.perf_counter()
    for name in peer.modules:
        importlib.import_module(name)
    imported = time.perf_counter()
    peer.load(options)
    loaded = time.perf_counter()
    return {
        "import_ms": (imported - begun) * 1000.0,
        "load_ms": (loaded - imported) * 1000.0,
        "versions": {name: metadata.version(name) for name in peer.packages},
    }


def _reply(peer: Peer, ids: list[int], new_tokens: int) -> dict[str, Any]:
    clock = _Clock()
    peer.generate(ids, new_tokens, clock)
    return clock.report(len(ids))


def _chat(peer: Peer, turns: list[list[int]], new_tokens: int) -> list[dict[str, Any]]:
    """A conversation by ids: each turn's prompt is all ids so far, replies as they were generated, and its own."""
    ids: list[int] = []
    found = []
    for turn in turns:
        ids += turn
        reply = _reply(peer, list(ids), new_tokens)
        found.append(reply)
        ids += reply["ids"]
    return found


def _peak_bytes() -> int | None:
    """The most memory this process has had; None where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
