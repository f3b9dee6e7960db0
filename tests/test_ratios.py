from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekit.ratios import as_ratio, multiplied, ratio_of, total
from moekit.types import Ratio

whole = st.integers(0, 10**6)
positive = st.integers(1, 10**6)


decimals = st.integers(0, 6).flatmap(lambda places: st.tuples(st.integers(0, 3 * 10 ** (6 + places)), st.just(places)))


@given(decimals)
def test_a_decimal_is_what_was_written(decimal: tuple[int, int]) -> None:
    digits, places = decimal
    assert ratio_of(digits / 10**places) == Fraction(digits, 10**places).as_integer_ratio()


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan"), 1e308, -1e308])
def test_what_is_not_finite_is_refused(number: float) -> None:
    with pytest.raises(ValueError, match="is no ratio of whole numbers; expected a finite number"):
        ratio_of(number)


def test_no_positive_number_becomes_zero() -> None:
    assert ratio_of(1e-9) == (1, 693_000_000)
    assert ratio_of(0.0) == (0, 1)
    assert ratio_of(ratio_of(1.25)) == (5, 4)


def test_a_ratio_is_not_repeated_by_mistake() -> None:
    assert str(Ratio(5, 4)) == "1.25"
    for product in (lambda: Ratio(5, 4) * 2, lambda: 2 * Ratio(5, 4)):
        with pytest.raises(TypeError, match=r"a ratio is a tuple; use moekit\.ratios"):
            product()


@pytest.mark.parametrize("parts", range(1, 13))
def test_fractions_are_exact(parts: int) -> None:
    for number in [*range(5 * parts), 3_000_000 * parts - 1]:
        assert ratio_of(number / parts) == Fraction(number, parts).as_integer_ratio()


@given(whole, positive, whole, positive)
def test_arithmetic_is_that_of_fractions(a: int, b: int, c: int, d: int) -> None:
    product = multiplied(Ratio(a, b), Ratio(c, d))
    assert as_ratio(product) == (Fraction(a, b) * Fraction(c, d)).as_integer_ratio()
    assert isinstance(product, int) == (a * c % (b * d) == 0)
    assert multiplied(a, Ratio(c, d)) == multiplied(Ratio(c, d), Ratio(a))
    assert total([(a, b), (c, d)]) == (Fraction(a, b) + Fraction(c, d)).as_integer_ratio()
    assert total([]) == (0, 1)


def test_compiled_code_takes_any_number() -> None:
    def room(x: torch.Tensor, factor: float) -> int:
        ratio, pool = ratio_of(factor), as_ratio(multiplied(x.shape[0], ratio_of(factor / 2)))
        return ratio.numerator * pool.numerator // (ratio.denominator * pool.denominator)

    torch.compiler.reset()
    compiled = torch.compile(room, fullgraph=True, backend="eager")
    for rows in (10, 131_072, 7):
        for factor in (1.0, 1.25, 4 / 3, 0.7, 8 / 7, 13 / 11):
            assert compiled(torch.zeros(rows), factor) == room(torch.zeros(rows), factor)
