"""Exact ratios of whole numbers that compiled code can trace, whatever changes between its runs: sizes or factors.

``fractions.Fraction`` reads digits and looks for common divisors, which Dynamo cannot do with a symbol.
"""

import math
from collections.abc import Iterable

import torch

from moekit.types import Ratio

_PARTS = 693_000_000  # of one: millionths, and the thirds, ninths, sevenths and elevenths of them


def ratio_of(number: float | Ratio) -> Ratio:
    """Return the ratio that was meant by a number: a decimal with up to six digits behind the point, or a fraction.

    Exact up to three million are such decimals and the fractions whose denominator is 12 or less. What a stage is bound
    to should be the ratio: where shapes depend on it, torch does not trace the second float.

    Args:
        number: rounded to 1 / 693,000,000, but no positive one to 0; or a ratio, which is returned.

    Returns:
        Ratio.

    Raises:
        ValueError: if it is not finite, or so large that its parts are not.

    Example:
        >>> ratio_of(1.1), ratio_of(8 / 7)
        (Ratio(numerator=11, denominator=10), Ratio(numerator=8, denominator=7))
    """
    if isinstance(number, Ratio):
        return number
    parts = number * _PARTS
    if not float("-inf") < parts < float("inf"):
        raise ValueError(f"{number} is no ratio of whole numbers; expected a finite number, below 1e299 or so.")
    whole = round(parts)
    return _reduced(1 if number > 0 and whole == 0 else whole, _PARTS)


def is_positive(number: float | Ratio) -> bool:
    """Say whether a number is positive and finite; what is no number of the host, as a tensor or a text, is not.

    Example:
        >>> is_positive(1.25), is_positive(Ratio(0)), is_positive(float("inf"))
        (True, False, False)
    """
    if isinstance(number, Ratio):
        return number.numerator > 0
    return not isinstance(number, torch.Tensor | str) and 0 < number < float("inf")


def as_ratio(number: int | Ratio) -> Ratio:
    """Return a number as a ratio.

    Example:
        >>> as_ratio(3)
        Ratio(numerator=3, denominator=1)
    """
    return number if isinstance(number, Ratio) else Ratio(number)


def multiplied(number: int | Ratio, by: Ratio) -> int | Ratio:
    """Return the product; eagerly an int where it is one.

    Args:
        number: whole, or a ratio.
        by: what it is multiplied by.

    Returns:
        The number times the ratio.

    Example:
        >>> multiplied(6, Ratio(2, 3)), multiplied(5, Ratio(2, 3))
        (4, Ratio(numerator=10, denominator=3))
    """
    numerator, denominator = as_ratio(number)
    product = _reduced(numerator * by.numerator, denominator * by.denominator)
    return product if torch.compiler.is_compiling() or product.denominator != 1 else product.numerator


def total(ratios: Iterable[tuple[int, int]]) -> Ratio:
    """Return a sum. Not for compiled code.

    Args:
        ratios: numerators and denominators.

    Returns:
        Ratio.

    Example:
        >>> total([(1, 3), (1, 6)])
        Ratio(numerator=1, denominator=2)
    """
    numerator, denominator = 0, 1
    for other, parts in ratios:
        numerator, denominator = _reduced(numerator * parts + other * denominator, denominator * parts)
    return Ratio(numerator, denominator)


def _reduced(numerator: int, denominator: int) -> Ratio:
    divisor = 1 if torch.compiler.is_compiling() else math.gcd(numerator, denominator)
    return Ratio(numerator // divisor, denominator // divisor)
