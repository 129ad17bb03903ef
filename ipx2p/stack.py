"""Stacks: named parts with parameters, in a line of text (layer 0, without torch).

    "apg:eta=0,norm=7.5+interval:low=0.28,high=5.4"

Guidance and fidelity are written so. What a part is, and what a stack of them means, is said where
they are declared; here are the grammar, the types and ranges of parameters, and the messages.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from ipx2p.errors import InputError, suggestion

Value = float | int | bool | str
# Numbers as people write them; Python would also accept 1_0 and digits of other scripts.
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|\+?inf", re.ASCII)
WHOLE = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)
MAX_SHOWN = 60  # characters of the user's text in a message


@dataclass(frozen=True)
class Parameter:
    """A setting of a part: `low <= value <= high`, or one of `choices`."""

    name: str
    default: Value | None  # None: a number worked out elsewhere
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()


def parameter(default: Any, low: float = -math.inf, high: float = math.inf, *choices: str) -> Any:
    """A field that can be set in the text of a stack."""
    return field(default=default, metadata={"low": low, "high": high, "choices": choices})


def parameters_of(made: type) -> dict[str, Parameter]:
    """What can be set of a dataclass: its fields with defaults, by name."""
    return {
        f.name: Parameter(f.name, f.default, **f.metadata)
        for f in fields(made)
        if f.default is not MISSING
    }


def split(text: str) -> list[str]:
    """The parts of a stack, as they are written; a plus may also be the sign of a number."""
    return [part.strip() for part in re.split(r"(?<!=)\+(?=\s*[a-z_])", text)]


def names_in(text: str) -> list[str]:
    """The names of its parts, known or not."""
    return [part.partition(":")[0].strip() for part in split(text)]


def parse_stack(
    text: str, known: Mapping[str, Mapping[str, Parameter]], kind: str, part: str
) -> list[tuple[str, dict[str, Value]]]:
    """The parts in their order, each with the parameters that are given.

    Args:
        known: parameters by name, of every part that there is.
        kind, part: for messages: what a stack is ("guidance"), and what it is made of ("scheme").
    Raises: InputError for an unknown name or parameter, one given twice, or a value out of range.
    """
    return [_parse(one, known, kind, part) for one in split(text)]


def stack_text(parts: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """The stack as it would be typed; None is a parameter without a value."""
    return "+".join(
        ":".join(filter(None, (name, ",".join(f"{k}={v}" for k, v in s.items() if v is not None))))
        for name, s in parts
    )


def shown(text: str) -> str:
    """The user's text, in one line."""
    return repr(text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}...")


def _parse(
    text: str, known: Mapping[str, Mapping[str, Parameter]], kind: str, part: str
) -> tuple[str, dict[str, Value]]:
    name, colon, rest = text.partition(":")
    if name not in known:
        raise InputError(f"unknown {kind} {part} {shown(name)}; {suggestion(name, [*known])}")
    settings: dict[str, Value] = {}
    for setting in rest.split(",") if colon else ():
        key, _, value = setting.partition("=")
        if key not in known[name]:
            names = suggestion(key, [*known[name]]) if known[name] else "it has none"
            raise InputError(f"{kind} {part} {name} has no parameter {shown(key)}; {names}")
        if key in settings:
            raise InputError(f"{kind} {part} {name} has {key} twice: keep one of them")
        settings[key] = _value(f"{kind} {name}:{key}", known[name][key], value)
    return name, settings


def _value(where: str, known: Parameter, text: str) -> Value:
    if known.choices:
        if text not in known.choices:
            names = suggestion(text, known.choices)
            raise InputError(f"{where} is {shown(text)}, which is not known; {names}")
        return text
    if isinstance(known.default, str):
        return text
    if isinstance(known.default, bool):
        answers = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in answers:
            raise InputError(f"{where} is {shown(text)}, expected true or false")
        return answers[text.lower()]
    whole = isinstance(known.default, int)
    if not (WHOLE if whole else NUMBER).fullmatch(text):
        kind = "a whole number" if whole else "a number"
        raise InputError(f"{where} is {shown(text)}, expected {kind}")
    value = int(text) if whole else float(text)
    # Infinity must be spelled out and make sense: 1e400 is a slip.
    too_large = math.isinf(value) and ("inf" not in text or math.isinf(known.low))
    if too_large or not known.low <= value <= known.high:
        within = f"{known.low:g} to {known.high:g}"
        expected = "a finite number" if math.isinf(known.low) else within
        raise InputError(f"{where} is {shown(text)}, out of range: expected {expected}")
    return value
