"""Streamed text adds up to the full decode, in whole characters, and never shows a piece of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ov_phi3.text.decoding import StopMatcher, StreamDecoder

BYTES = [bytes([b]) for b in range(256)] + [b" the", "é".encode(), "日本".encode(), b" "]


def decoder(**options: object) -> StreamDecoder:
    return StreamDecoder(BYTES.__getitem__, **options)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, len(BYTES) - 1)), st.integers(1, 4), st.booleans())
def test_steps_add_up_to_the_whole(ids: list[int], step: int, strips: bool) -> None:
    stream = decoder(strips_space=strips)
    pieces = [stream.add(ids[i : i + step]) for i in range(0, len(ids), step)] + [stream.flush()]
    raw = b"".join(BYTES[i] for i in ids)
    if strips and raw.startswith(b" "):
        raw = raw[1:]
    assert "".join(pieces) == raw.decode("utf-8", "replace")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_valid_text_never_shows_a_replacement(text: str) -> None:
    stream = decoder()
    pieces = [stream.add([b]) for b in text.encode()]
    assert "".join(pieces) == text
    assert all("\ufffd" not in p for p in pieces) or "\ufffd" in text


def test_a_character_comes_when_it_is_whole() -> None:
    stream = decoder()
    assert [stream.add([b]) for b in "🦙".encode()] == ["", "", "", "🦙"]


def test_half_a_character_at_the_end_is_flushed() -> None:
    stream = decoder()
    assert stream.add(list("🦙".encode()[:3])) == ""
    assert stream.flush() == "\ufffd"


def test_skipped_ids_give_nothing() -> None:
    assert decoder(skipped={65}).add([65, 66]) == "B"


def cut(text: str, stops: list[str], include: bool) -> str:
    """The stop string that is complete first ends the text; of two that end together the one that began first."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    if not ends:
        return text
    end, start = min(ends)
    return text[: end if include else start]


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), max_size=30),
    st.booleans(),
)
def test_stops_do_not_depend_on_the_pieces(text: str, stops: list[str], sizes: list[int], include: bool) -> None:
    matcher = StopMatcher(stops, include=include)
    shown, rest = "", text
    for size in [*sizes, len(text) + 1]:
        shown += matcher.add(rest[:size])
        rest = rest[size:]
        # What was shown so far is never taken back, so no piece of a stop string may be in it.
        assert cut(text, stops, include).startswith(shown)
    shown += matcher.flush()
    assert shown == cut(text, stops, include)
    assert (matcher.matched is not None) == any(s in text for s in stops)


@pytest.mark.parametrize(("stop", "held"), [("\n\n", "\n"), ("END", "EN"), ("ab", "a")])
def test_a_possible_beginning_is_held_back_and_given_at_the_end(stop: str, held: str) -> None:
    matcher = StopMatcher([stop])
    assert matcher.add("x" + held) == "x"
    assert matcher.flush() == held


def test_nothing_comes_after_a_match() -> None:
    matcher = StopMatcher(["."])
    assert [matcher.add("a.b"), matcher.add("c"), matcher.flush()] == ["a", "", ""]
