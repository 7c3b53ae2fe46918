"""The first complete stop string ends the text, and no part of one is shown before."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ov_phi3.text.stop_strings import StopMatcher


def cut(text: str, stops: list[str], include: bool) -> str:
    """The reference: the stop string that is complete first ends the text; of two, the one that starts earlier."""
    matches = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if not matches:
        return text
    end, start = min(matches)
    return text[: end if include else start]


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), max_size=30),
    st.booleans(),
)
def test_the_cut_does_not_depend_on_the_chunks(text: str, stops: list[str], sizes: list[int], include: bool) -> None:
    matcher = StopMatcher(stops, include=include)
    shown, rest = "", text
    for size in [*sizes, len(text) + 1]:
        shown += matcher.add(rest[:size])
        rest = rest[size:]
        # Shown text is never taken back, so no part of a stop string may be in it.
        assert cut(text, stops, include).startswith(shown)
    shown += matcher.flush()
    assert shown == cut(text, stops, include)
    assert (matcher.matched is not None) == any(stop in text for stop in stops)


@pytest.mark.parametrize(("stop", "held"), [("\n\n", "\n"), ("END", "EN"), ("ab", "a")])
def test_a_possible_start_is_held_back_and_flushed(stop: str, held: str) -> None:
    matcher = StopMatcher([stop])
    assert matcher.add("x" + held) == "x"
    assert matcher.flush() == held


def test_nothing_is_shown_after_a_match() -> None:
    matcher = StopMatcher(["."])
    assert [matcher.add("a.b"), matcher.add("c"), matcher.flush()] == ["a", "", ""]
