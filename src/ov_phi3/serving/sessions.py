"""Conversations whose keys and values are kept, whatever else the cache is needed for."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ov_phi3.errors import ConfigError, Error

if TYPE_CHECKING:
    from ov_phi3.pipeline import Pipeline
    from ov_phi3.prefix import Prefix

__all__ = ["Sessions"]

_log = logging.getLogger("ov_phi3.serving")


class Sessions:
    """Copies of the keys and values of conversations, by session; the ones used least recently go first.

    A request finds them by its ids, as everything in the cache: the session's name is no part of a reply. A client that
    changes an earlier message, or a reply whose text is encoded with other ids than it was generated with, reuses what
    comes before the first id that differs.

    Args:
        pipe: the model.
        most: sessions to keep.
        most_bytes: size of all their copies together.
    """

    def __init__(self, pipe: Pipeline, most: int, most_bytes: int) -> None:
        self._pipe = pipe
        self._most = most
        self._most_bytes = most_bytes
        self._prefixes: OrderedDict[str, Prefix] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._prefixes)

    @property
    def nbytes(self) -> int:
        """Size of all copies, in bytes."""
        return sum(prefix.nbytes for prefix in self._prefixes.values())

    @property
    def possible(self) -> bool:
        """Whether the backend can read its cache."""
        try:
            self.check()
        except ConfigError:
            return False
        return True

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
            while len(self._prefixes) > self._most or self.nbytes > self._most_bytes:
                self._prefixes.popitem(last=False)
