"""Tokens by their text: `bad_words`, and what breaks a repetition for DRY."""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BadWords", "Breakers", "TokenTexts"]


class TokenTexts:
    """The text of every token, as bytes.

    Args:
        token_bytes: the bytes of a token.
        special_ids: tokens that a text leaves out.
        size: of the vocabulary.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], special_ids: Collection[int], size: int) -> None:
        self._token_bytes = token_bytes
        self.special_ids = special_ids
        self._size = size
        self.containing = functools.lru_cache(1024)(self._containing)
        self.starting_with = functools.lru_cache(4096)(self._starting_with)

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text."""
        return b"" if token in self.special_ids else self._token_bytes(token)

    def _containing(self, part: bytes) -> NDArray[np.int64]:
        """The tokens with this part."""
        return np.array([i for text, i in self._sorted if part in text], dtype=np.int64)

    def _starting_with(self, part: bytes) -> NDArray[np.int64]:
        """The tokens with this start."""
        first = bisect_left(self._sorted, (part, -1))
        last = bisect_left(self._sorted, (part + b"\xff" * 1024, -1), first)
        return np.array([i for _, i in self._sorted[first:last]], dtype=np.int64)

    @functools.cached_property
    def _sorted(self) -> list[tuple[bytes, int]]:
        return sorted((self.bytes_of(i), i) for i in range(self._size))


class BadWords:
    """The tokens that may not come next, so that no reply has one of these words in its text.

    A word is found however it is cut into tokens: a token is excluded that would complete it. An entry of token ids is
    these ids in this order, as in transformers' `bad_words_ids`.

    Args:
        words: texts, and sequences of token ids.
        ids: the prompt; token ids may begin there, texts begin in the reply.
        texts: the vocabulary.
    """

    def __init__(self, words: Sequence[str | Sequence[int]], ids: Sequence[int], texts: TokenTexts) -> None:
        self._texts = texts
        self._words = [word.encode() for word in words if isinstance(word, str)]
        self._sequences = [tuple(word) for word in words if not isinstance(word, str)]
        self._text = b""
        self._keep = max((len(word) - 1 for word in self._words), default=0)
        self._keep_ids = max((len(sequence) - 1 for sequence in self._sequences), default=0)
        self._ids = tuple(ids[len(ids) - min(self._keep_ids, len(ids)) :])
        self._always = np.unique(
            np.concatenate([np.zeros(0, dtype=np.int64), *(texts.containing(word) for word in self._words)])
        )

    def note(self, token: int) -> None:
        """Add a token to the reply."""
        text = self._text + self._texts.bytes_of(token)
        self._text = text[len(text) - min(self._keep, len(text)) :]
        ids = (*self._ids, token)
        self._ids = ids[len(ids) - min(self._keep_ids, len(ids)) :]

    def banned(self) -> NDArray[np.int64]:
        """The tokens that may not come next."""
        found = [self._always]
        for word in self._words:
            begun = range(1, min(len(word), len(self._text) + 1))
            found += [self._texts.starting_with(word[n:]) for n in begun if self._text.endswith(word[:n])]
        last = [s[-1] for s in self._sequences if len(s) == 1 or self._ids[-(len(s) - 1) :] == s[:-1]]
        return np.concatenate([*found, np.array(last, dtype=np.int64)])


class Breakers:
    """Whether a text that breaks a repetition ends with a token; told every token of a sequence, one after the other.

    Special tokens break too: what a chat template puts around every message is no repetition of the model's.

    Args:
        breakers: the texts.
        texts: the vocabulary.
    """

    def __init__(self, breakers: Sequence[str], texts: TokenTexts) -> None:
        self._breakers = [breaker.encode() for breaker in breakers]
        self._texts = texts
        self._keep = max((len(breaker) - 1 for breaker in self._breakers), default=0)
        self._text = b""

    def __call__(self, token: int) -> bool:
        """Note a token."""
        if token in self._texts.special_ids:
            self._text = b""
            return True
        before = len(self._text)
        text = self._text + self._texts.bytes_of(token)
        self._text = text[len(text) - min(self._keep, len(text)) :]
        return any(text.find(b, max(0, before - len(b) + 1)) >= 0 for b in self._breakers)
