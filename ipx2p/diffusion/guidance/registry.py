"""All guidance schemes by name, and stacks of them from a line of text (layer 1).

    "apg:eta=0,norm=7.5+interval:low=0.28,high=5.4+rescale:phi=0.7"

is one linear scheme, ip2p unless one is named, and modifiers. Schemes are declared where they are
written (see `scheme.py`); nothing has to be added here.
"""

import math
import re
import sys
from functools import lru_cache
from numbers import Real

from ipx2p.diffusion.guidance import (
    conditions,
    depth,
    estimates,
    extra_branches,
    linear,
    over_time,
    pushes,
)
from ipx2p.diffusion.guidance.scheme import Modifier, Parameter, Scheme, declared_in
from ipx2p.diffusion.guidance.spec import GuidanceSpec
from ipx2p.errors import InputError, suggestion

SCHEMES: dict[str, Scheme] = {
    name: scheme
    for module in (linear, over_time, pushes, extra_branches, estimates, conditions, depth)
    for name, scheme in declared_in(vars(module)).items()
}
DEFAULT = "ip2p"
# Numbers as people write them; Python would also accept 1_0 and digits of other scripts.
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|\+?inf", re.ASCII)
WHOLE = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)
MAX_SHOWN = 60  # characters of the user's text in a message


def parse_guidance(
    text: str, *, guidance_scale: float, image_guidance_scale: float
) -> GuidanceSpec:
    """Parse and check a stack such as `full:joint_scale=5+apg`.

    Raises: InputError for an unknown scheme or parameter, a value out of its range, schemes that do
        not stack, or a scale that is not a finite number.
    """
    if not isinstance(text, str):
        raise InputError(f"guidance is {text!r}, expected a text such as 'ip2p+apg'")
    scales = {"guidance_scale": guidance_scale, "image_guidance_scale": image_guidance_scale}
    for name, scale in scales.items():
        if not (isinstance(scale, Real) and abs(scale) <= sys.float_info.max):
            raise InputError(
                f"{name} is {repr(scale)[:MAX_SHOWN]}, expected a finite number such as 7.0"
            )
    return _parse_stack(text, *map(float, scales.values()))


@lru_cache(maxsize=4096)  # a sweep asks for the same few again and again
def _parse_stack(text: str, guidance_scale: float, image_guidance_scale: float) -> GuidanceSpec:
    parts = [_parse(part.strip()) for part in re.split(r"(?<!=)\+(?=\s*[a-z_])", text)]
    bases = [part for part in parts if part[0].is_linear]
    if len(bases) > 1:
        names = " and ".join(scheme.name for scheme, _ in bases)
        raise InputError(
            f"guidance {_shown(text)} names two linear schemes, {names}: keep one of them"
        )
    modifiers = [scheme.make(**settings) for scheme, settings in parts if not scheme.is_linear]
    _check_repeats(text, modifiers)
    base, settings = bases[0] if bases else (SCHEMES[DEFAULT], {})
    settings = {p.name: p.default for p in base.parameters.values()} | settings
    return GuidanceSpec(
        base, tuple(settings.items()), tuple(modifiers), guidance_scale, image_guidance_scale
    )


def _check_repeats(spec: str, modifiers: list[Modifier]) -> None:
    for i, modifier in enumerate(modifiers):
        for other in modifiers[:i]:
            conditions = {getattr(m, "on", "both") for m in (modifier, other)}
            if type(modifier) is type(other) and conditions != {"text", "image"}:
                ways = " or give each its own condition, on=text and on=image"
                raise InputError(
                    f"guidance {_shown(spec)} has {modifier.scheme.name} twice: keep one of them"
                    f"{ways if hasattr(modifier, 'on') else ''}"
                )


def _shown(text: str) -> str:
    """The user's text, in one line."""
    return repr(text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}...")


def _parse(part: str) -> tuple[Scheme, dict[str, float | int | bool | str]]:
    name, colon, text = part.partition(":")
    if name not in SCHEMES:
        raise InputError(f"unknown guidance scheme {_shown(name)}; {suggestion(name, [*SCHEMES])}")
    scheme, known = SCHEMES[name], SCHEMES[name].parameters
    settings = {}
    for setting in text.split(",") if colon else ():
        key, _, value = setting.partition("=")
        if key not in known:
            names = suggestion(key, [*known]) if known else "it has none"
            raise InputError(f"guidance scheme {name} has no parameter {_shown(key)}; {names}")
        if key in settings:
            raise InputError(f"guidance scheme {name} has {key} twice: keep one of them")
        settings[key] = _value(f"guidance {name}:{key}", known[key], value)
    return scheme, settings


def _value(where: str, known: Parameter, text: str) -> float | int | bool | str:
    if known.choices:
        if text not in known.choices:
            names = suggestion(text, known.choices)
            raise InputError(f"{where} is {_shown(text)}, which is not known; {names}")
        return text
    if isinstance(known.default, str):
        return text
    if isinstance(known.default, bool):
        answers = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in answers:
            raise InputError(f"{where} is {_shown(text)}, expected true or false")
        return answers[text.lower()]
    whole = isinstance(known.default, int)
    if not (WHOLE if whole else NUMBER).fullmatch(text):
        kind = "a whole number" if whole else "a number"
        raise InputError(f"{where} is {_shown(text)}, expected {kind}")
    value = int(text) if whole else float(text)
    # Infinity must be spelled out and make sense: 1e400 is a slip.
    too_large = math.isinf(value) and ("inf" not in text or math.isinf(known.low))
    if too_large or not known.low <= value <= known.high:
        within = f"{known.low:g} to {known.high:g}"
        expected = "a finite number" if math.isinf(known.low) else within
        raise InputError(f"{where} is {_shown(text)}, out of range: expected {expected}")
    return value
