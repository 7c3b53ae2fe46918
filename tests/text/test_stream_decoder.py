"""Streamed text adds up to the full decode, in whole characters."""

from hypothesis import given
from hypothesis import strategies as st

from ov_phi3.text.stream_decoder import StreamDecoder

BYTES = [bytes([b]) for b in range(256)] + [b" the", "é".encode(), "日本".encode(), b" "]


def decoder(**options: object) -> StreamDecoder:
    return StreamDecoder(BYTES.__getitem__, **options)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, len(BYTES) - 1)), st.integers(1, 4), st.booleans())
def test_chunks_add_up_to_the_full_decode(ids: list[int], step: int, strips_space: bool) -> None:
    stream = decoder(strips_space=strips_space)
    chunks = [stream.add(ids[i : i + step]) for i in range(0, len(ids), step)] + [stream.flush()]
    data = b"".join(BYTES[i] for i in ids)
    if strips_space and data.startswith(b" "):
        data = data[1:]
    assert "".join(chunks) == data.decode("utf-8", "replace")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_valid_text_never_shows_a_replacement_character(text: str) -> None:
    stream = decoder()
    chunks = [stream.add([b]) for b in text.encode()]
    assert "".join(chunks) == text
    assert all("\ufffd" not in chunk for chunk in chunks) or "\ufffd" in text


def test_a_character_is_shown_when_it_is_complete() -> None:
    stream = decoder()
    assert [stream.add([b]) for b in "🦙".encode()] == ["", "", "", "🦙"]


def test_an_incomplete_last_character_is_flushed() -> None:
    stream = decoder()
    assert stream.add(list("🦙".encode()[:3])) == ""
    assert stream.flush() == "\ufffd"


def test_skipped_ids_give_no_text() -> None:
    assert decoder(skipped={65}).add([65, 66]) == "B"
