"""Choosing pairs by their fields: `task == "derain" and psnr < 30` (layer 2).

Conditions are written as in Python, but may hold only comparisons, `in`, `and`, `or`, `not`, texts,
numbers and the names of `FIELDS`; nothing is evaluated as code. A field is measured only if the
outcome depends on it, so pictures are opened only for the pairs that need it.
"""

import ast
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

from ipx2p.data.manifest import Line
from ipx2p.errors import InputError, suggestion
from ipx2p.images import image_size, load_image, pixels01_from_image
from ipx2p.metrics import psnr

KINDS = {str: "a text", float: "a number", bool: "true or false"}
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def _psnr(line: Line) -> float:
    source, target = (pixels01_from_image(load_image(path))[None] for path in line.pictures)
    return float(psnr(source, target))


# Name -> kind of the value, and how it is measured.
FIELDS: dict[str, tuple[type, Callable[[Line], Any]]] = {
    "task": (str, lambda line: line.record.task),
    "split": (str, lambda line: line.record.split),
    "group": (str, lambda line: line.record.group or ""),
    "source": (str, lambda line: line.record.source),
    "target": (str, lambda line: line.record.target),
    "sentences": (float, lambda line: len(line.record.instructions)),
    "words": (float, lambda line: max(len(text.split()) for text in line.record.instructions)),
    "captions": (bool, lambda x: bool(x.record.source_caption and x.record.target_caption)),
    "width": (float, lambda line: image_size(line.pictures[1])[0]),
    "height": (float, lambda line: image_size(line.pictures[1])[1]),
    "psnr": (float, _psnr),
}
Value = Callable[[Callable[[str], Any]], Any]  # takes a function that measures a field by its name


class Where:
    """A condition on pairs. InputError says what is wrong with its text."""

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._holds = _read_condition(ast.parse(text.strip(), mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = getattr(error, "msg", str(error)) or "nested too deeply"
            raise InputError(f"--where {text[:150]!r}: {reason}") from None

    def __reduce__(self) -> tuple:
        return Where, (self.text,)  # for worker processes

    def __call__(self, line: Line) -> bool:
        """Whether the condition holds for a pair. InputError names a picture that is bad."""
        try:
            return self._holds(cache(lambda name: FIELDS[name][1](line)))
        except InputError as error:
            raise InputError(f"{line.where}: {error}") from None


def _read(node: ast.expr) -> tuple[type, Value]:
    """The kind of an expression, and its value as a function of a pair's fields."""
    match node:
        case ast.Constant(value=str() | bool() as value):
            return type(value), lambda of: value
        case ast.Constant(value=int() | float() as value):
            return float, lambda of: value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return float, lambda of: -value
        case ast.Name(id=name):
            if name not in FIELDS:
                raise SyntaxError(f"there is no field {name!r}; {suggestion(name, [*FIELDS])}")
            return FIELDS[name][0], lambda of: of(name)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            holds = _read_condition(operand)
            return bool, lambda of: not holds(of)
        case ast.BoolOp(op=op, values=values):
            parts = [*map(_read_condition, values)]
            decide = all if isinstance(op, ast.And) else any  # both stop as soon as they can
            return bool, lambda of: decide(part(of) for part in parts)
        case ast.Compare(left=left, ops=ops, comparators=rights):
            parts = [*map(_read_comparison, [left, *rights], ops, rights)]
            return bool, lambda of: all(part(of) for part in parts)
    raise SyntaxError(f"{ast.unparse(node)} is not allowed, expected comparisons of fields")


def _read_condition(node: ast.expr) -> Value:
    kind, holds = _read(node)
    if kind is not bool:
        raise SyntaxError(f"{ast.unparse(node)} is {KINDS[kind]}, expected a comparison")
    return holds


def _read_comparison(left: ast.expr, op: ast.cmpop, right: ast.expr) -> Value:
    kind, value = _read(left)
    if isinstance(op, ast.In | ast.NotIn) and isinstance(right, ast.Tuple | ast.List):
        items = [_read(item) for item in right.elts]
        kinds, other = {kind for kind, _ in items}, lambda of: [item(of) for _, item in items]
    else:
        other_kind, other = _read(right)
        kinds = {other_kind, str} if isinstance(op, ast.In | ast.NotIn) else {other_kind}
    if type(op) not in COMPARISONS or not kinds <= {kind}:
        comparison = ast.unparse(ast.Compare(left, [op], [right]))
        raise SyntaxError(f"{comparison} does not compare two texts or two numbers, or with a list")
    compare = COMPARISONS[type(op)]
    return lambda of: compare(value(of), other(of))
