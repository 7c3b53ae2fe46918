"""What a reply puts in place of the tokens of its source."""

from __future__ import annotations

from ov_phi3.backends.paged.lookup import LookupDrafter
from ov_phi3.backends.paged.step_costs import StepCosts
from ov_phi3.backends.paged.substitutions import Substitutions

FREE = StepCosts({1: 1.0, 16: 1.0})
NAME, OTHER = 7, 8


def learn(known: Substitutions, before: int, came: int, followed: int = 5) -> bool:
    return known.learn(before, NAME, followed, came, everywhere=True)


class TestSubstitutions:
    def test_nothing_is_known_of_a_token_that_was_never_replaced(self) -> None:
        known = Substitutions()
        assert not learn(known, 1, NAME)
        assert known.guess(1, NAME, 5) is None

    def test_a_replacement_is_expected_behind_the_same_token_at_once_and_elsewhere_when_confirmed(self) -> None:
        known = Substitutions()
        assert not learn(known, 1, OTHER)
        assert known.guess(1, NAME, 5) == (OTHER, 0.7)
        assert known.guess(2, NAME, 5) == (NAME, 0.5)
        assert learn(known, 2, OTHER)
        token, chance = known.guess(3, NAME, 5) or (0, 0.0)
        assert token == OTHER
        assert chance > 0.5

    def test_one_that_does_not_come_again_is_forgotten(self) -> None:
        known = Substitutions()
        learn(known, 1, OTHER)
        learn(known, 1, NAME)
        assert known.guess(1, NAME, 5) is None

    def test_one_that_was_confirmed_outlives_an_exception(self) -> None:
        known = Substitutions()
        for came in (OTHER, OTHER, OTHER, NAME):
            learn(known, 1, came)
        token, _ = known.guess(1, NAME, 5) or (0, 0.0)
        assert token == OTHER

    def test_the_last_replacement_counts(self) -> None:
        known = Substitutions()
        learn(known, 1, OTHER)
        learn(known, 1, 9)
        token, _ = known.guess(1, NAME, 5) or (0, 0.0)
        assert token == 9

    def test_what_was_followed_for_long_needs_more_to_be_replaced(self) -> None:
        known = Substitutions()
        learn(known, 1, OTHER)
        assert known.guess(2, NAME, 20) == (NAME, 0.85)

    def test_outcomes_correct_the_estimates(self) -> None:
        known = Substitutions()
        for token in range(100, 120):  # each is replaced once, and kept the next time
            known.learn(1, token, 5, OTHER, everywhere=False)
            known.learn(1, token, 5, token, everywhere=False)
        known.learn(1, NAME, 5, OTHER, everywhere=False)
        token, chance = known.guess(1, NAME, 5) or (0, 0.0)
        assert token == NAME
        assert chance > 0.7
        for token in range(200, 220):  # each is replaced by the same one again
            known.learn(1, token, 5, OTHER, everywhere=False)
            known.learn(1, token, 5, OTHER, everywhere=False)
        token, chance = known.guess(1, NAME, 5) or (0, 0.0)
        assert token == OTHER
        assert chance > 0.7


class TestDrafts:
    def test_a_name_that_was_replaced_twice_is_drafted_with_what_follows_it(self) -> None:
        lines = [[start, start + 1, start + 2, NAME, start + 3, start + 4] for start in (100, 200, 300, 400)]
        source = [token for line in lines for token in line]
        lookup = LookupDrafter(source, FREE)
        reply = [OTHER if token == NAME else token for token in source]
        lookup.add(reply[:14])
        assert lookup.predicted(8) == reply[14:22]

    def test_a_list_becomes_records(self) -> None:
        """Commas of the list become the marks between the fields, and each value is followed by the next field."""
        comma, line, opened, closed, mark = 1, 2, 3, 4, (5, 6)
        columns = [[(first + row, first + row + 1, 9) for row in range(0, 40, 10)] for first in (100, 200, 300)]
        rows = list(zip(*columns, strict=True))
        prompt = [token for a, b, c in rows for token in (*a, comma, *b, comma, *c, line)]
        records = [[opened, 50, 51, *a, *mark, 60, 61, *b, *mark, 70, 71, *c, closed] for a, b, c in rows]
        lookup = LookupDrafter(prompt, FREE)
        lookup.add([token for record in records[:3] for token in record])
        added = 0
        for first in (3, 10, 17):  # behind the first token of a value come the others, and the next field
            lookup.add(records[3][added : first + 1])
            added = first + 1
            assert lookup.predicted(6) == [*records[3], *records[2][:3]][added : added + 6]

    def test_looking_ahead_changes_nothing(self) -> None:
        text = [1, 2, 3, 4, 5, 1, 2, 9, 4, 5, 1, 2]
        looked, fresh = LookupDrafter(text, FREE), LookupDrafter(text, FREE)
        for token in (9, 4, 5, 6, 1, 2, 3):
            looked.chances(15)
            looked.predicted(15)
            looked.add([token])
            fresh.add([token])
            assert looked.predicted(10) == fresh.predicted(10)
