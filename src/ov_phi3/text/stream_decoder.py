"""Incremental detokenization: token ids to text that holds whole characters only.

Pure Python, constant time per token. The results of all `add` calls and of `flush`, joined, equal the full decode.
"""

from __future__ import annotations

import codecs
import copy
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
        before: the last bytes of the text that this one continues, at least four or all; they complete a character
            that they begin. The space at the start then stays.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        *,
        skipped: Collection[int] = (),
        strips_space: bool = False,
        before: bytes = b"",
    ) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._strip_next = strips_space and not before
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._utf8.decode(before)

    def fork(self) -> StreamDecoder:
        """A decoder that continues from here by itself."""
        copied = copy.copy(self)
        copied._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        copied._utf8.setstate(self._utf8.getstate())
        return copied

    def add(self, ids: Iterable[int]) -> str:
        """Return the text that these ids complete; empty while a character is incomplete."""
        data = b"".join(self._token_bytes(i) for i in ids if i not in self._skipped)
        if self._strip_next and data:
            self._strip_next = False
            data = data[1:] if data.startswith(b" ") else data
        return self._utf8.decode(data)

    @property
    def incomplete(self) -> bool:
        """Whether it holds the first bytes of a character."""
        return bool(self._utf8.getstate()[0])

    def flush(self, *, final: bool = True) -> str:
        """Return the rest at the end of the reply, if its last character is incomplete.

        Args:
            final: the text ends here, so the rest is U+FFFD. False leaves it out: further ids may complete it.
        """
        return self._utf8.decode(b"", final=True) if final else ""
