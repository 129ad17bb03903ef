"""All guidance schemes by name, and stacks of them from a line of text (layer 1).

    "apg:eta=0,norm=7.5+interval:low=0.28,high=5.4+rescale:phi=0.7"

is one linear scheme, ip2p unless one is named, and modifiers. Schemes are declared where they are
written (see `scheme.py`); nothing has to be added here.
"""

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
from ipx2p.diffusion.guidance.scheme import Modifier, Scheme, declared_in
from ipx2p.diffusion.guidance.spec import GuidanceSpec
from ipx2p.errors import InputError
from ipx2p.stack import MAX_SHOWN, parse_stack, shown

SCHEMES: dict[str, Scheme] = {
    name: scheme
    for module in (linear, over_time, pushes, extra_branches, estimates, conditions, depth)
    for name, scheme in declared_in(vars(module)).items()
}
PARAMETERS = {name: scheme.parameters for name, scheme in SCHEMES.items()}
DEFAULT = "ip2p"


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
    named = parse_stack(text, PARAMETERS, "guidance", "scheme")
    parts = [(SCHEMES[name], settings) for name, settings in named]
    bases = [part for part in parts if part[0].is_linear]
    if len(bases) > 1:
        names = " and ".join(scheme.name for scheme, _ in bases)
        raise InputError(
            f"guidance {shown(text)} names two linear schemes, {names}: keep one of them"
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
                    f"guidance {shown(spec)} has {modifier.scheme.name} twice: keep one of them"
                    f"{ways if hasattr(modifier, 'on') else ''}"
                )
