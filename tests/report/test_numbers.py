import pytest

from ray_explain.report import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.617, ".62"),
        (1.0, "1.00"),
        (0.0, ".00"),
        (-0.05, "−.05"),
        (-0.001, ".00"),
        (None, "–"),
        (float("nan"), "–"),
        (float("inf"), "–"),
    ],
)
def test_a_fraction_is_told_in_two_decimals_and_never_as_nan(value: float | None, text: str) -> None:
    assert numbers.decimal(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.21, "+.21"), (-0.21, "−.21"), (0.001, ".00"), (0.0, ".00"), (None, "–")]
)
def test_a_difference_has_its_sign_unless_it_rounds_to_zero(value: float | None, text: str) -> None:
    assert numbers.signed(value) == text


def test_a_bound_that_would_be_read_as_zero_gets_a_third_decimal() -> None:
    assert numbers.digits_for(0.05, 0.003, 0.1) == 3
    assert numbers.digits_for(0.05, 0.0, None) == 2


@pytest.mark.parametrize(
    ("p_value", "text"),
    [
        (0.0498, "p = .0498"),
        (0.05, "p = .050"),
        (0.0002, "p < .001"),
        (0.034, "p = .034"),
        (0.6, "p = .60"),
        (1.0, "p = 1.00"),
        (None, ""),
    ],
)
def test_a_p_value_is_never_told_as_zero_nor_as_the_threshold_that_it_is_below(
    p_value: float | None, text: str
) -> None:
    assert numbers.p_text(p_value) == text
    assert numbers.p_decimals(p_value) != ".0000"


def test_a_p_value_in_a_table_has_four_decimals_or_says_that_it_is_smaller() -> None:
    assert [numbers.p_decimals(p) for p in (0.034, 1e-9, 1.0, None)] == [".0340", "< .0001", "1.0000", "–"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (38.2, "38 s"), (59.9, "1 min 0 s"), (252, "4 min 12 s"), (3780, "1 h 03 min")],
)
def test_a_duration_is_told_in_the_units_that_fit(seconds: float, text: str) -> None:
    assert numbers.duration(seconds).replace(numbers.THIN, " ") == text


def test_layers_are_in_their_order_and_not_in_that_of_their_digits() -> None:
    assert sorted(["layer=10-11", "layer=2", "layer=1"], key=numbers.natural) == ["layer=1", "layer=2", "layer=10-11"]
    assert sorted(["m10", "m2²", "m2"], key=numbers.natural) == ["m2", "m2²", "m10"]  # ² is a digit, and no number


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.998, ".998"), (518016, "518,016"), (1234.5, "1,234"), (True, "yes"), (None, "–"), ([0, 1], "0, 1"), ("x", "x")],
)
def test_a_value_of_any_kind_is_told(value: object, text: str) -> None:
    assert numbers.anything(value) == text


def test_a_long_text_is_cut_and_says_how_long_it_was() -> None:
    assert numbers.clip("a" * 3000, 10) == "aaaaaaaaaa … (3,000 characters)"
    assert numbers.clip("short", 10) == "short"


def test_shares_and_seeds_are_told_in_words() -> None:
    assert numbers.share_label(0.3).replace(numbers.THIN, " ") == "30 % of the training data"
    assert numbers.share_label(0.1, 0.025).replace(numbers.THIN, " ") == "10 %, 2.5 % of the training data"
    assert (numbers.seeds_label((0,)), numbers.seeds_label((0, 2))) == ("seed 0", "seeds 0, 2")
