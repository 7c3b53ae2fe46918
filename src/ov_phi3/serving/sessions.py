"""Conversations whose keys and values are kept, whatever else the cache is needed for."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ov_phi3.errors import Error

if TYPE_CHECKING:
    from ov_phi3.pipeline import Pipeline
    from ov_phi3.prefix import Prefix

__all__ = ["Sessions"]

_log = logging.getLogger("ov_phi3.serving")


class Sessions:
    """Copies of the keys and values of conversations, by session; the ones used least recently go first.

    Args:
        pipe: the model.
        most: sessions to keep.
    """

    def __init__(self, pipe: Pipeline, most: int) -> None:
        self._pipe = pipe
        self._most = most
        self._prefixes: OrderedDict[str, Prefix] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._prefixes)

    def check(self) -> None:
        """Refuse sessions where they cannot be kept.

        Raises:
            ConfigError: the backend cannot read its cache.
        """
        self._pipe.engine.require("saves_kv", "session_id")

    def keep(self, session_id: str, ids: Sequence[int]) -> None:
        """Keep the keys and values of a conversation, which are in the cache; runs in a thread."""
        try:
            prefix = self._pipe.prefill(list(ids))
        except Error as exc:
            _log.warning("session %r was not kept: %s", session_id, exc)
            return
        with self._lock:
            self._prefixes[session_id] = prefix
            self._prefixes.move_to_end(session_id)
            while len(self._prefixes) > self._most:
                self._prefixes.popitem(last=False)
