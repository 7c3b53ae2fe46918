"""DRY, n-grams and loops, each against its definition computed from the whole sequence at every token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ov_phi3.backends.repetition import DryPenalty, LoopDetector, NgramBans
from ov_phi3.backends.words import BadWords, Breakers, TokenTexts

SIZE = 5
BREAKER = 4
few = st.lists(st.integers(0, SIZE - 1), max_size=30)


def dry_by_definition(ids: list[int], allowed: int, last_n: int) -> list[float]:
    """Penalties with multiplier 1 and base 2: every earlier position, compared backwards."""
    seen = ids if last_n < 0 else ids[len(ids) - min(last_n, len(ids)) :]
    longest = [0] * SIZE
    for position in range(len(seen)):
        length = 0
        while (
            length < position
            and seen[position - 1 - length] == seen[len(seen) - 1 - length]
            and seen[position - 1 - length] != BREAKER
        ):
            length += 1
        longest[seen[position]] = max(longest[seen[position]], length)
    return [2.0 ** (n - allowed) if n >= allowed else 0.0 for n in longest]


class TestDry:
    @given(few, few, st.integers(1, 4), st.sampled_from([-1, 0, 1, 3, 8]))
    def test_equals_the_definition(self, prompt: list[int], reply: list[int], allowed: int, last_n: int) -> None:
        dry = DryPenalty(1.0, 2.0, allowed, last_n, prompt, lambda token: token == BREAKER)
        ids = list(prompt)
        for token in [*reply, None]:
            scores = np.zeros(SIZE, dtype=np.float32)
            penalized = dry.apply(scores)
            assert (-scores).tolist() == dry_by_definition(ids, allowed, last_n)
            assert sorted(penalized) == np.flatnonzero(scores).tolist()
            if token is not None:
                dry.note(token)
                ids.append(token)

    def test_stays_finite(self) -> None:
        dry = DryPenalty(1e30, 1e30, 1, -1, [1] * 50, lambda token: False)
        scores = np.zeros(SIZE, dtype=np.float32)
        dry.apply(scores)
        assert np.isfinite(scores).all()
        assert scores[1] < -1e29

    def test_a_long_prompt_of_one_token(self) -> None:
        """Quadratic time would take minutes here."""
        dry = DryPenalty(1.0, 1.01, 2, -1, [1] * 20_000, lambda token: False)
        scores = np.zeros(SIZE, dtype=np.float32)
        dry.apply(scores)
        assert scores[1] < -1e29


class TestNgrams:
    @given(few, few, st.integers(1, 4))
    def test_equals_the_definition(self, prompt: list[int], reply: list[int], size: int) -> None:
        bans, ids = NgramBans(size, prompt), list(prompt)
        for token in [*reply, None]:
            grams = {tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)}
            last = tuple(ids[len(ids) - size + 1 :]) if size > 1 else ()
            assert set(bans.banned()) == {t for t in range(SIZE) if (*last, t) in grams}
            if token is not None:
                bans.note(token)
                ids.append(token)


class TestLoop:
    @given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 5), st.integers(2, 4))
    def test_equals_the_definition(self, reply: list[int], window: int, repeats: int) -> None:
        detector = LoopDetector(window, repeats, 40)
        for end in range(1, len(reply) + 1):
            detector.note(reply[end - 1])
            parts = [reply[end - size * repeats : end] for size in range(1, window + 1) if size * repeats <= end]
            assert detector.found == any(part == part[: len(part) // repeats] * repeats for part in parts)

    def test_too_short_for_any_loop(self) -> None:
        detector = LoopDetector(10, 5, 3)
        detector.note(1)
        assert not detector.found


VOCABULARY = [b"a", b"b", b"ab", b"ba", b"", b" a", b"\xc3", b"\xa9", b"\xc3\xa9b", b"bab"]
texts = TokenTexts(VOCABULARY.__getitem__, {4}, len(VOCABULARY))


class TestBadWords:
    @given(
        st.lists(st.text("ab é", min_size=1, max_size=4), min_size=1, max_size=3),
        st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=12),
    )
    def test_equals_the_definition(self, words: list[str], reply: list[int]) -> None:
        bad, text = BadWords(words, [0, 1], texts), b""
        for token in [*reply, None]:
            expected = {i for i, more in enumerate(VOCABULARY) if any(word.encode() in text + more for word in words)}
            banned = set(bad.banned().tolist())
            if not any(word.encode() in text for word in words):
                assert banned == expected
            if token is not None:
                bad.note(token)
                text += VOCABULARY[token]

    def test_ids_may_begin_in_the_prompt(self) -> None:
        bad = BadWords([(7, 8, 9), (3,)], [6, 7], texts)
        assert bad.banned().tolist() == [3]
        bad.note(8)
        assert sorted(bad.banned().tolist()) == [3, 9]
        bad.note(8)
        assert bad.banned().tolist() == [3]


@pytest.mark.parametrize(
    ("breakers", "expected"),
    [
        (["a"], [True, False, True, True, True]),
        (["ba"], [False, False, True, False, True]),
        (["b", "aaab"], [False, True, False, True, True]),
        ([], [False, False, False, False, True]),
    ],
)
def test_breakers_end_with_a_token(breakers: list[str], expected: list[bool]) -> None:
    is_breaker: Any = Breakers(breakers, texts)
    assert [is_breaker(token) for token in (0, 1, 0, 2, 4)] == expected
