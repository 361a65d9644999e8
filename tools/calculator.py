"""Arithmetic for the agent. Walks Python's own syntax tree instead of calling eval: numbers and operators, no names."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable

from langchain_core.tools import tool

_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_LONGEST_EXPRESSION = 500
_LARGEST_BITS = 4096


@tool
def calculator(expression: str) -> str:
    """Work out an arithmetic expression of numbers, + - * / // % ** and parentheses, such as (12.5 * 4) / 3."""
    if len(expression) > _LONGEST_EXPRESSION:
        raise ValueError(f"the expression is longer than {_LONGEST_EXPRESSION} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"not an arithmetic expression: {error.msg}") from error
    return _written(_value(tree.body))


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=bool()):
            raise ValueError("numbers only, no true or false")
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _combined(type(op), _value(left), _value(right))
    raise ValueError(f"{ast.unparse(node)} is not allowed: numbers and operators only")


def _combined(op: type[ast.operator], left: float, right: float) -> float:
    try:
        if op is ast.Pow and _power_bits(left, right) > _LARGEST_BITS:
            raise ValueError("that power is too large to write down")
        result = _BINARY[op](left, right)
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(str(error)) from error
    if isinstance(result, complex):
        raise ValueError("the result is not a real number")
    return result


def _power_bits(base: float, exponent: float) -> float:
    """About how many bits an integer power has: an agent may ask for 9**9**9, and Python would try."""
    return math.log2(abs(base)) * exponent if isinstance(base, int) and abs(base) > 1 else 0.0


def _written(number: float) -> str:
    is_too_large = number.bit_length() > _LARGEST_BITS if isinstance(number, int) else not math.isfinite(number)
    if is_too_large:
        raise ValueError("the result is too large to write down")
    return (
        repr(int(number)) if isinstance(number, float) and number.is_integer() and abs(number) < 1e15 else repr(number)
    )
