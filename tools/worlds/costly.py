"""Calls whose arguments alone decide how long they take, refused before a package runs them.

Such a call cannot be stopped: a power of large whole numbers, or a root to a million digits, is computed within one
step of the interpreter, and until it ends nothing else of the process runs, no time-out either.
"""

from __future__ import annotations

from typing import Any

MAX_DIGITS = 1_000
"""Of a whole number, and of a precision that is asked for."""
MAX_RESULT_BITS = 100_000
"""Of a power of whole numbers."""
MAX_EXPRESSION = 1_000
"""Characters of arithmetic that a package evaluates."""


def refuse_costly_power(base: Any, exponent: Any) -> None:
    """Raise ValueError where a power of whole numbers would be astronomically long; others are floats, and quick."""
    if isinstance(base, int) and isinstance(exponent, int) and abs(exponent) * base.bit_length() > MAX_RESULT_BITS:
        raise ValueError("the result would have too many digits: take a smaller exponent")


def refuse_costly_precision(precision: Any) -> None:
    """Raise ValueError where more digits are asked for than anybody reads."""
    if isinstance(precision, int | float) and not precision <= MAX_DIGITS:
        raise ValueError(f"precision is at most {MAX_DIGITS} digits")


def refuse_costly_arithmetic(expression: Any) -> None:
    """Raise ValueError where an expression is too long, or has powers in it (`**`)."""
    text = str(expression)
    if len(text) > MAX_EXPRESSION:
        raise ValueError(f"an expression has at most {MAX_EXPRESSION} characters, not {len(text)}")
    if "**" in text:
        raise ValueError("powers (**) are not among the operators +, -, * and /")


def refuse_long_numbers(value: Any) -> None:
    """Raise ValueError for a whole number of more than `MAX_DIGITS` digits anywhere in a call's arguments."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            refuse_long_numbers(part)
    elif isinstance(value, int) and value.bit_length() > MAX_DIGITS * 3.33:
        raise ValueError(f"a number has at most {MAX_DIGITS} digits")
