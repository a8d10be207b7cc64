"""Inputs that cases describe by the NumPy expressions that drew them.

Expressions are read from their syntax tree: numbers, lists, arithmetic, slices, the names given, and of NumPy the
functions and methods below. Nothing else is called.
"""
from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

FUNCTIONS = ("abs", "arange", "array", "clip", "concatenate", "cos", "exp", "eye", "float32", "float64", "full",
             "int32", "int64", "linspace", "log", "maximum", "minimum", "ones", "pi", "repeat", "sin", "sqrt", "tile",
             "uint8", "where", "zeros")
METHODS = ("T", "astype", "beta", "choice", "copy", "cumsum", "flatten", "integers", "max", "mean", "normal",
           "permutation", "randint", "randn", "random", "reshape", "shape", "size", "standard_normal", "sum",
           "transpose", "uniform")
OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.USub: operator.neg,
    ast.UAdd: operator.pos, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}


class Normal:
    """`normal` of the recipes: called with a shape it draws float32 of that shape, in `x + 0.3*normal` that of x."""

    __array_ufunc__ = None  # so that NumPy leaves the sum to __radd__

    def __init__(self, rng: np.random.Generator, scale: float = 1.0) -> None:
        self.rng, self.scale = rng, np.float32(scale)

    def __call__(self, *shape: Any) -> np.ndarray:
        shape = shape[0] if len(shape) == 1 else shape
        return self.scale * self.rng.standard_normal(shape).astype(np.float32)

    def __rmul__(self, scale: float) -> Normal:
        return Normal(self.rng, scale * self.scale)

    def __radd__(self, values: np.ndarray) -> np.ndarray:
        return values + self(values.shape)


def computed(text: str, **names: Any) -> Any:
    """Return the value of an expression; `names` are what it may refer to beside NumPy."""
    return value_of(ast.parse(text.strip(), mode="eval").body, names)


def assigned(text: str, **names: Any) -> dict[str, Any]:
    """Run "a=EXPRESSION; b=EXPRESSION" in order and return all values by name.

    What stands between semicolons and assigns nothing is left out; words after an expression end at its last comma.
    """
    known = dict(names)
    for part in text.split(";"):
        statement = assignment(part)
        if statement is not None:
            name, expression = statement
            known[name] = value_of(expression, known)
    return known


def assignment(text: str) -> tuple[str, ast.expr] | None:
    """Return name and expression of the assignment at the beginning of a text, None if it begins otherwise."""
    name, equals, expression = text.strip().partition("=")
    name = name.strip().rpartition(" ")[2]  # after words such as "per step:"
    while equals and name.isidentifier() and expression:
        try:
            return name, ast.parse(expression.strip(), mode="eval").body
        except SyntaxError:
            expression = expression.rpartition(",")[0]
    return None


def value_of(node: ast.expr, names: dict[str, Any]) -> Any:
    """Return the value of a part of an expression."""
    def inner(part: ast.expr) -> Any:
        return value_of(part, names)

    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return named(node.id, names)
        case ast.Tuple():
            return tuple(map(inner, node.elts))
        case ast.List():
            return list(map(inner, node.elts))
        case ast.UnaryOp() if type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](inner(node.operand))
        case ast.BinOp() if type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](inner(node.left), inner(node.right))
        case ast.Compare() if len(node.ops) == 1 and type(node.ops[0]) in OPERATORS:
            return OPERATORS[type(node.ops[0])](inner(node.left), inner(node.comparators[0]))
        case ast.Slice():
            return slice(*(None if end is None else inner(end) for end in (node.lower, node.upper, node.step)))
        case ast.Subscript():
            return inner(node.value)[inner(node.slice)]
        case ast.Attribute():
            return attribute(inner(node.value), node.attr)
        case ast.Call():
            return inner(node.func)(*map(inner, node.args), **{word.arg: inner(word.value) for word in node.keywords})
    raise ValueError(f"a recipe with {ast.unparse(node)!r} cannot be read")


def named(name: str, names: dict[str, Any]) -> Any:
    if name in names:
        return names[name]
    if name in ("np", "numpy"):
        return np
    return attribute(np, name)


def attribute(value: Any, name: str) -> Any:
    """Return a member of NumPy, or of an array or a generator."""
    if isinstance(value, ModuleType):
        if name in ("default_rng", "RandomState"):
            return getattr(np.random, name)
        if value is np and name in (*FUNCTIONS, "random"):
            return getattr(np, name)
    elif isinstance(value, (np.ndarray, np.generic, np.random.Generator, np.random.RandomState)) and name in METHODS:
        return getattr(value, name)
    raise ValueError(f"a recipe with {name!r} cannot be read")
