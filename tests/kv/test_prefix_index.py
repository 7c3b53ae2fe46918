"""The estimated prefix cache: which tokens match, and which block is evicted."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ov_phi3.kv import prefix_index
from ov_phi3.kv.prefix_index import BlockLedger


def ids(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


def counted(start: int, count: int) -> Any:
    return np.arange(start, start + count, dtype=np.int64)


def commit(ledger: Any, prompt: Any, generated: Any = (), **options: Any) -> None:
    ledger.commit(prompt, list(generated), **{"longest": len(generated), "exact": True, **options})


class TestLedger:
    def test_an_empty_cache_matches_nothing(self) -> None:
        assert BlockLedger(4, 10).match(counted(0, 9)) == 0

    def test_full_blocks_and_the_remainder_of_the_last_one(self) -> None:
        ledger = BlockLedger(4, 10)
        commit(ledger, counted(0, 10))  # blocks of 4, 4 and 2
        assert ledger.match(counted(0, 30)) == 10
        assert ledger.match(np.append(counted(0, 9), 99)) == 8  # the remainder differs
        assert ledger.match(np.append(counted(0, 7), 99)) == 4
        assert ledger.match(ids(99, *range(1, 10))) == 0

    def test_the_last_token_is_always_computed(self) -> None:
        ledger = BlockLedger(4, 10)
        commit(ledger, counted(0, 8))
        assert ledger.match(counted(0, 8)) == 7
        assert ledger.match(counted(0, 5)) == 4

    def test_generated_ids_match_too(self) -> None:
        ledger = BlockLedger(4, 10)
        commit(ledger, counted(0, 6), counted(6, 5))
        assert ledger.match(counted(0, 20)) == 11

    def test_a_remainder_that_grew_no_longer_matches(self) -> None:
        ledger = BlockLedger(4, 10)
        commit(ledger, counted(0, 6))
        commit(ledger, counted(0, 7))
        assert ledger.match(ids(*range(6), 50, 51)) == 4
        assert ledger.match(counted(0, 9)) == 7

    def test_an_inexact_end_counts_full_blocks_only(self) -> None:
        ledger = BlockLedger(4, 10)
        commit(ledger, counted(0, 6), counted(6, 5), exact=False)
        assert ledger.match(counted(0, 20)) == 8

    def test_namespaces_are_separate(self) -> None:
        ledger = BlockLedger(4, 10)
        commit(ledger, counted(0, 8))
        assert ledger.match(counted(0, 12), b"other") == 0
        commit(ledger, counted(0, 12), namespace=b"other")
        assert ledger.match(counted(0, 12), b"other") == 11

    def test_the_least_recently_used_block_is_evicted_first(self) -> None:
        ledger = BlockLedger(4, 4)
        commit(ledger, counted(0, 8))
        commit(ledger, counted(100, 8))
        commit(ledger, counted(0, 8))  # used again
        commit(ledger, counted(200, 8))
        assert ledger.match(counted(0, 9)) == 8
        assert ledger.match(counted(100, 9)) == 0
        assert ledger.match(counted(200, 9)) == 8

    def test_unused_blocks_are_taken_before_cached_ones(self) -> None:
        ledger = BlockLedger(4, 6)
        for start in (0, 100, 200):
            commit(ledger, counted(start, 8))
        assert [ledger.match(counted(start, 9)) for start in (0, 100, 200)] == [8, 8, 8]

    def test_other_sequences_take_blocks(self) -> None:
        ledger = BlockLedger(4, 4)
        commit(ledger, counted(0, 8))
        commit(ledger, counted(100, 4), extra_blocks=3)
        assert ledger.match(counted(0, 9)) == 0

    def test_a_growing_cache_makes_room_for_twice_the_prompt(self) -> None:
        ledger = BlockLedger(4)
        commit(ledger, counted(0, 8), longest=8)  # 4 blocks
        commit(ledger, counted(100, 8), longest=8)
        assert ledger.match(counted(0, 9)) == 8
        commit(ledger, counted(200, 8), longest=8)
        assert ledger.match(counted(0, 9)) == 0
        assert ledger.capacity == 16
        commit(ledger, counted(300, 8), counted(308, 300))
        assert ledger.match(counted(300, 400)) == 308

    def test_after_a_failure_nothing_matches(self) -> None:
        ledger = BlockLedger(4, 6)
        commit(ledger, counted(0, 8))
        ledger.invalidate()
        assert ledger.match(counted(0, 9)) == 0
        for start in (100, 200, 300):
            commit(ledger, counted(start, 8))
        assert [ledger.match(counted(start, 9)) for start in (100, 200, 300)] == [8, 8, 8]

    @given(
        st.lists(
            st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(0, 8), st.booleans()), min_size=1, max_size=30
        ),
        st.sampled_from([0, 8, 12]),
    )
    def test_a_match_is_the_beginning_of_an_earlier_request(
        self, requests: list[tuple[int, int, int, bool]], num_blocks: int
    ) -> None:
        """Never longer than the beginning of an earlier request, never the whole prompt; no block is ever lost."""
        ledger, earlier = BlockLedger(4, num_blocks), []
        for base, prompt, reply, exact in requests:
            whole = counted(base * 1000, prompt + reply)
            matched = ledger.match(whole[:prompt])
            assert matched < prompt
            assert matched <= max((len(a) for a in earlier if a[0] == whole[0]), default=0)
            commit(ledger, whole[:prompt], whole[prompt:], exact=exact)
            earlier.append(whole)
            assert len(ledger._free) + len(ledger._stored) == ledger._num_blocks
            assert num_blocks == 0 or ledger._num_blocks == num_blocks


class SearchingLedger(BlockLedger):
    """The ledger with its former eviction, as the expected value: a search of all blocks for the oldest date.

    Taken from the version before `_BlocksByAge`, with the new names. Of equal dates the first block in the order of the
    dictionary is evicted.
    """

    def __init__(self, block_size: int, num_blocks: int = 0) -> None:
        super().__init__(block_size, num_blocks)
        self._stored: Any = {}

    def commit(
        self,
        ids: Any,
        generated: Sequence[int],
        *,
        longest: int,
        exact: bool,
        namespace: bytes = b"",
        extra_blocks: int = 0,
    ) -> None:
        block = self.block_size
        content = np.concatenate([ids, np.array(generated, dtype=np.int64)])
        blocks = -(-len(content) // block)
        held, _ = self._match_blocks(ids, namespace)
        if self.growable:
            self._enlarge(-(-min(2 * len(ids), len(ids) + longest) // block))
        self._clock += 1
        for key in held:
            del self._stored[key]
        dates = [self._clock] * len(held)
        dates += [self._allocate() for _ in range(blocks - len(held))]
        key = namespace
        for index, date in enumerate(dates):
            part = content[index * block : (index + 1) * block]
            key = prefix_index._block_key(key, part)
            self._store(key if exact or len(part) == block else self._unknown_key(), date)
        for _ in range(min(extra_blocks, self._num_blocks or extra_blocks)):
            self._store(self._unknown_key(), self._allocate())

    def _allocate(self) -> int:
        if not self._free and not self._stored and self.growable:
            self._enlarge(self._num_blocks + 256 // self.block_size)
        if self._free:
            return self._free.popleft()
        if self._stored:
            del self._stored[min(self._stored, key=self._stored.__getitem__)]
        return self._clock

    def _store(self, key: bytes, date: int) -> None:
        if key in self._stored:
            self._free.append(self._stored[key])
        self._stored[key] = date

    def invalidate(self) -> None:
        self._stored = {self._unknown_key(): date for date in self._stored.values()}


def contents(ledger: BlockLedger) -> tuple[dict[bytes, int], deque[int]]:
    """Keys of all cached blocks with their dates, and the dates of the unused blocks."""
    stored: Any = ledger._stored
    entries = stored if isinstance(stored, dict) else {key: date for key, (date, _) in stored._entries.items()}
    return dict(entries), ledger._free


class TestEviction:
    def history(self, draw: random.Random) -> None:
        """One random history of requests, failures and look-ups, on both ledgers."""
        size, num_blocks = draw.choice([1, 2, 4]), draw.choice([0, 2, 3, 5, 8, 20])
        pair = (BlockLedger(size, num_blocks), SearchingLedger(size, num_blocks))
        for _ in range(draw.randint(1, 25)):
            ids = counted(draw.choice([0, 0, 100, 200]), draw.randint(1, 6 * size))
            if draw.random() < 0.3:
                ids[draw.randrange(len(ids)) :] += draw.choice([1000, 2000])
            namespace = draw.choice([b"", b"", b"long"])
            if draw.random() < 0.05:
                for ledger in pair:
                    ledger.invalidate()
            else:
                reply = counted(draw.choice([500, 600]), draw.randint(0, 3 * size)).tolist()
                longest, exact, extra = draw.randint(0, 30), draw.random() < 0.8, draw.choice([0, 0, 1, 3])
                for ledger in pair:
                    ledger.commit(ids, reply, longest=longest, exact=exact, namespace=namespace, extra_blocks=extra)
            assert contents(pair[0]) == contents(pair[1])
            prompt = counted(draw.choice([0, 100]), draw.randint(1, 30))
            assert pair[0].match(prompt, namespace) == pair[1].match(prompt, namespace)

    def test_evicts_the_blocks_that_a_search_would(self) -> None:
        for seed in range(3000):
            self.history(random.Random(seed))

    @pytest.mark.parametrize("num_blocks", [64, 4096])
    def test_an_eviction_does_not_search_the_cache(self, num_blocks: int) -> None:
        """Dates compared per block that is used or evicted: a few for each level of a heap."""
        ledger = BlockLedger(1, num_blocks)
        ledger._clock = Date(ledger._clock)
        commit(ledger, counted(0, num_blocks))
        commit(ledger, counted(0, num_blocks))  # now every date is counted
        Date.compared = 0
        shared, used = counted(0, 8), 0
        for start in range(10**6, 10**6 + 200 * 8, 8):
            commit(ledger, np.append(shared, counted(start, 8)))  # used again, and eight evictions
            used += len(shared) + 8
        assert len(ledger._stored) == num_blocks
        assert Date.compared <= 3 * used * math.log2(num_blocks)


class Date(int):
    """A date that counts how often dates are compared."""

    compared = 0

    def __add__(self, other: int) -> Date:
        return Date(int(self) + other)

    def __lt__(self, other: int) -> bool:
        Date.compared += 1
        return int(self) < int(other)

    def __eq__(self, other: object) -> bool:
        Date.compared += 1
        return int(self) == other

    __hash__ = int.__hash__
