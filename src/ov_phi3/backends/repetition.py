"""What a reply repeats of itself and its prompt: for DRY, `no_repeat_ngram_size` and `stop_on_loop`.

Each class is told every token once and keeps an index, so that a token costs the same at any length of the reply.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DryPenalty", "LoopDetector", "NgramBans"]

_LARGEST_PENALTY = 1e30  # a float32 that logits can be reduced by without becoming infinite


class NgramBans:
    """The tokens that would complete an n-gram that the sequence has already, as transformers' no_repeat_ngram_size.

    Args:
        size: of the n-grams, at least 1.
        ids: the prompt, whose n-grams count too.
    """

    def __init__(self, size: int, ids: Sequence[int]) -> None:
        self._before = size - 1
        self._last: tuple[int, ...] = ()
        self._followers: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
        for token in ids:
            self.note(token)

    def note(self, token: int) -> None:
        """Add a token to the sequence."""
        if len(self._last) == self._before:
            self._followers[self._last].add(token)
        self._last = (*self._last, token)[-self._before :] if self._before else ()

    def banned(self) -> list[int]:
        """The tokens that may not come next."""
        return list(self._followers.get(self._last, ()))


class DryPenalty:
    """DRY, "don't repeat yourself" (https://github.com/oobabooga/text-generation-webui/pull/5677).

    Where the last n tokens have come before, the token that followed them there is reduced by
    multiplier * base ** (n - allowed_length), if n is at least `allowed_length`; the longest such n counts. A breaker
    ends the repeated part: no n reaches beyond the last one.

    For every position behind an earlier occurrence of the last `allowed_length` tokens, the length of its match is kept
    from token to token; an index by these tokens finds the new ones.

    Args:
        multiplier: see above.
        base: see above.
        allowed_length: see above, at least 1.
        last_n: only the last so many tokens are looked at; -1 for all.
        ids: the prompt, which counts too.
        is_breaker: whether a breaker ends with this token, given one after the other.
    """

    def __init__(
        self,
        multiplier: float,
        base: float,
        allowed_length: int,
        last_n: int,
        ids: Sequence[int],
        is_breaker: Callable[[int], bool],
    ) -> None:
        self._multiplier, self._base, self._allowed, self._last_n = multiplier, base, allowed_length, last_n
        self._is_breaker = is_breaker
        self._ids = list(ids)
        self._since_breaker = 0
        for token in ids:
            self._since_breaker = 0 if is_breaker(token) else self._since_breaker + 1
        self._positions: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for position in range(allowed_length, len(self._ids)):
            self._positions[tuple(self._ids[position - allowed_length : position])].append(position)
        lengths = _suffix_matches(self._ids)
        self._matches = {at: lengths[at] for at in self._here()}

    def note(self, token: int) -> None:
        """Add a token to the sequence."""
        self._since_breaker = 0 if self._is_breaker(token) else self._since_breaker + 1
        self._positions[self._key()].append(len(self._ids))
        self._ids.append(token)
        before, one_more = self._matches, self._allowed - 1
        # Whatever is not in `before` matched by one token less than the index needs.
        self._matches = {at: before.get(at - 1, one_more) + 1 for at in self._here()}

    def apply(self, scores: NDArray[np.float32]) -> list[int]:
        """Reduce the scores of the tokens that would prolong a repetition, and return these tokens.

        Args:
            scores: float32, shape [vocabulary]; changed in place.
        """
        longest: dict[int, int] = {}
        start = 0 if self._last_n < 0 else len(self._ids) - self._last_n
        for at, match in self._matches.items():
            length = min(match, self._since_breaker, at - start)
            if length >= self._allowed and length > longest.get(self._ids[at], 0):
                longest[self._ids[at]] = length
        for token, length in longest.items():
            scores[token] -= self._penalty(length - self._allowed)
        return list(longest)

    def _penalty(self, beyond: int) -> float:
        exponent = math.log(self._multiplier) + beyond * math.log(self._base)
        return math.exp(min(exponent, math.log(_LARGEST_PENALTY)))

    def _key(self) -> tuple[int, ...]:
        return tuple(self._ids[-self._allowed :])

    def _here(self) -> Sequence[int]:
        """Positions behind the earlier occurrences of the last tokens."""
        return self._positions.get(self._key(), ())


def _suffix_matches(ids: Sequence[int]) -> list[int]:
    """For every position, how many tokens before it equal those at the end of `ids`: the Z function, from behind."""
    count = len(ids)
    matches = [0] * count
    low = high = 0  # in distances from the end: the window [low, high) repeats the end
    for distance in range(1, count):
        length = min(high - distance, matches[count - distance + low]) if distance < high else 0
        while distance + length < count and ids[count - 1 - distance - length] == ids[count - 1 - length]:
            length += 1
        matches[count - distance] = length
        if distance + length > high:
            low, high = distance, distance + length
    return matches


class LoopDetector:
    """Whether a reply ends with one and the same part several times in a row.

    Args:
        window: longest part, in tokens.
        repeats: how often it must come, at least twice.
        limit: longest reply; longer parts cannot come that often.
    """

    def __init__(self, window: int, repeats: int, limit: int) -> None:
        window = min(window, limit // repeats)
        self._recent = np.full(window, -1, dtype=np.int64)  # the latest token first
        self._equal = np.zeros(window, dtype=np.int64)  # how many tokens in a row equal the one a period earlier
        self._needed = np.arange(1, window + 1) * (repeats - 1)
        self.found = False

    def note(self, token: int) -> None:
        """Add a token to the reply."""
        self._equal = (self._equal + 1) * (self._recent == token)
        self.found = bool((self._equal >= self._needed).any())
        self._recent[1:] = self._recent[:-1]
        self._recent[:1] = token
