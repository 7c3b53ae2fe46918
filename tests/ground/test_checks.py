"""Checks of arguments that several packages share."""

from __future__ import annotations

import numpy as np
import pytest

from ov_phi3.checks import whole_number
from ov_phi3.errors import ConfigError


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.int32(3)])
def test_integers_also_of_numpy_become_int(value: object) -> None:
    number = whole_number("turns", value)
    assert number == 3
    assert type(number) is int


@pytest.mark.parametrize("value", [True, False, np.True_, np.array(True), 3.0, np.float32(3), "3", None, [3], b"3"])
def test_any_other_type_is_a_type_error_with_name_and_value(value: object) -> None:
    with pytest.raises(TypeError) as caught:
        whole_number("context_length", value, "tokens")
    assert str(caught.value) == f"context_length must be a whole number of tokens, not {value!r}"


def test_the_unit_may_be_left_out() -> None:
    with pytest.raises(TypeError, match=r"^turns must be a whole number, not 1\.5$"):
        whole_number("turns", 1.5)


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (0, {"least": 1}, "size=0; expected at least 1 tokens."),
        (9, {"most": 8}, "size=9; expected at most 8 tokens."),
        (1, {"least": 2, "most": 8}, "size=1; expected 2 to 8 tokens."),
        (9, {"least": 2, "most": 8, "note": ", the window"}, "size=9; expected 2 to 8 tokens, the window."),
    ],
)
def test_a_value_out_of_range_is_a_config_error_with_value_and_range(
    value: int, limits: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        whole_number("size", value, "tokens", **limits)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [2, 8])
def test_both_ends_of_the_range_are_allowed(value: int) -> None:
    assert whole_number("size", value, least=2, most=8) == value


def test_a_number_of_ten_thousand_digits_gives_a_short_message() -> None:
    with pytest.raises(ConfigError) as caught:
        whole_number("size", 10**10_000, most=8)
    assert len(str(caught.value)) < 100
