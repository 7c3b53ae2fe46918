"""Incremental detokenization: token ids to text that holds whole characters only.

Pure Python, constant time per token. The results of all `add` calls and of `flush`, joined, equal the full decode.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Iterable

__all__ = ["StreamDecoder"]


class StreamDecoder:
    """Decode a growing list of token ids.

    The bytes of an incomplete character wait for the next token. Bytes that cannot become a character turn into U+FFFD
    as in Python and in Unicode's recommended practice (Unicode 16, section 3.9, "maximal subparts").

    Args:
        token_bytes: returns the bytes of a token id.
        skipped: ids that give no text.
        strips_space: remove one space from the start of the text, which SentencePiece's mark leaves there.
    """

    def __init__(
        self, token_bytes: Callable[[int], bytes], *, skipped: Collection[int] = (), strips_space: bool = False
    ) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._strip_next = strips_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Iterable[int]) -> str:
        """Return the text that these ids complete; empty while a character is incomplete."""
        data = b"".join(self._token_bytes(i) for i in ids if i not in self._skipped)
        if self._strip_next and data:
            self._strip_next = False
            data = data[1:] if data.startswith(b" ") else data
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Return the rest at the end of the reply: U+FFFD if the last character is incomplete, else an empty string."""
        return self._utf8.decode(b"", final=True)
