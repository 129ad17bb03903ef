"""Fidelity: knobs that keep an edit from inventing content, and stacks of them (layer 0).

    "mask:threshold=0.1+wavelet:weight=0.5"

is a stack. A knob of pixels turns the source s and the edit e, both (3, h, w) in [0, 1], into
another edit. It acts on the decoded picture at the size that the model edits at, so it means the
same for an original of any size. Others act earlier: `start` on where sampling begins, `wrap` on
how latents are decoded.

Every knob has a neutral value, at which the edit is the plain one, bit for bit: it is then left
out. A knob is a class whose annotated fields are its parameters, under `@knob(...)`; its name is
that of the class in lower case.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ipx2p.errors import InputError
from ipx2p.stack import parameter, parameters_of, parse_stack, shown, stack_text
from ipx2p.transfer import TRANSFERS, carried, low_pass

PLAIN = "none"  # the stack without any knob
MAX_LEVELS = 8  # of smoothing: pixels 128 apart
VARIANCE_EPS = 1e-5  # for a picture of one colour, in squared [0, 1] units
BY = [name for name in TRANSFERS if name != "upscale"]  # which is the plain edit

KNOBS: dict[str, type["Knob"]] = {}
Kind = TypeVar("Kind", bound="Knob")


class Knob:
    """What all knobs share."""

    neutral: ClassVar[tuple[str, float]]  # the parameter, and its value, that changes nothing

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    def acts(self) -> bool:
        """Whether it changes anything."""
        name, value = self.neutral
        return getattr(self, name) != value

    def apply(self, source: Tensor, edit: Tensor) -> Tensor:
        """The changed edit, not clamped; as it is for a knob that acts before there are pixels."""
        return edit


def knob(**neutral: float) -> Callable[[type[Kind]], type[Kind]]:
    """Add a class to `KNOBS`, as a frozen dataclass; neutral: the parameter that is its knob."""

    def declare(made: type[Kind]) -> type[Kind]:
        made = dataclass(frozen=True)(made)
        made.neutral = next(iter(neutral.items()))
        KNOBS[made.__name__.lower()] = made
        return made

    return declare


@knob(strength=1.0)
class Start(Knob):
    """Sampling starts from the noised source, in the last `strength` of the steps.

    SDEdit (arXiv:2108.01073) for edit models; see `Plan.from_source`.
    """

    strength: float = parameter(0.8, 0.01, 1.0)


@knob(weight=0.0)
class Wrap(Knob):
    """The decoder sees the features of the source: w of StableSR (arXiv:2305.07015, sec. 3.3).

    For weights with a trained feature wrapping, see `ipx2p.models.wrapping`.
    """

    weight: float = parameter(1.0, 0.0, 1.0)


@knob(weight=0.0)
class Transfer(Knob):
    """(1 - weight) e + weight t, where t is the source to which a transfer has carried the edit.

    By `affine`, t is near each pixel an affine function of the source's colours: what the edit has
    beyond that is gone. See `ipx2p.transfer`; here the copy and the original are the same.
    """

    weight: float = parameter(1.0, 0.0, 1.0)
    by: str = parameter("auto", -math.inf, math.inf, *BY)

    def apply(self, source: Tensor, edit: Tensor) -> Tensor:
        return torch.lerp(edit, carried(source, edit, self.by), self.weight)


@knob(threshold=0.0)
class Mask(Knob):
    """m e + (1 - m) s, with m = low(r), r = low(|e - s|) / threshold - 1 between 0 and 1.

    low smooths as in `wavelet`, |e - s| is the mean over the channels. So the source stays where
    the change is below the threshold, and the edit where it is above twice of it. The second
    smoothing makes soft edges of a change that ends abruptly.
    """

    threshold: float = parameter(0.02, 0.0, 1.0)
    levels: int = parameter(3, 0, MAX_LEVELS)

    def apply(self, source: Tensor, edit: Tensor) -> Tensor:
        return torch.lerp(source, edit, self.mask(source, edit))

    def mask(self, source: Tensor, edit: Tensor) -> Tensor:
        """m, (1, h, w) in [0, 1]."""
        change = low_pass((edit - source).abs().mean(0, keepdim=True), self.levels)
        return low_pass((change / self.threshold - 1).clamp(0, 1), self.levels)


@knob(weight=0.0)
class AdaIN(Knob):
    """Each channel gets the source's mean and standard deviation, by `weight`.

    arXiv:1703.06868, eq. 8, on pixels, as StableSR (arXiv:2305.07015) corrects colours.
    """

    weight: float = parameter(1.0, 0.0, 1.0)

    def apply(self, source: Tensor, edit: Tensor) -> Tensor:
        (mean, spread), (own_mean, own_spread) = _moments(source), _moments(edit)
        return torch.lerp(edit, (edit - own_mean) / own_spread * spread + mean, self.weight)


@knob(weight=0.0)
class Wavelet(Knob):
    """The low part of the edit becomes the source's, by `weight`; its high part stays.

    The split is that of StableSR (arXiv:2305.07015): low is smoothed by 1-2-1 along both sides at
    distances 1, 2, 4, ..., and high is what that takes away.
    """

    weight: float = parameter(1.0, 0.0, 1.0)
    levels: int = parameter(5, 1, MAX_LEVELS)

    def apply(self, source: Tensor, edit: Tensor) -> Tensor:
        return edit + self.weight * low_pass(source - edit, self.levels)  # smoothing is linear


EARLY = (Start, Wrap)  # before there are pixels, in this order


@dataclass(frozen=True)
class FidelitySpec:
    """Knobs in the order in which they act: as they are written, but for those of `EARLY`."""

    knobs: tuple[Knob, ...]

    def __str__(self) -> str:
        """The stack as it would be typed with every parameter."""
        parts = ((one.name, {f.name: getattr(one, f.name) for f in fields(one)}) for one in self)
        return stack_text(parts) or PLAIN

    def __iter__(self) -> Iterator[Knob]:
        return iter(self.knobs)

    @property
    def acting(self) -> "FidelitySpec":
        """Without the neutral ones: equal for stacks that are the same computation."""
        return FidelitySpec(tuple(one for one in self if one.acts))

    def find(self, kind: type[Kind]) -> Kind | None:
        """The knob of a kind, if there is one that acts."""
        return next((one for one in self.acting if isinstance(one, kind)), None)

    def apply(self, source01: Tensor, edit01: Tensor) -> Tensor:
        """The edit after all knobs of pixels, (3, h, w) in [0, 1]; clamped after each."""
        for one in self.acting:
            edit01 = one.apply(source01, edit01).clamp(0, 1)
        return edit01


def parse_fidelity(text: str) -> FidelitySpec:
    """Parse and check a stack such as `start:strength=0.8+wavelet`, or `none`.

    Raises: InputError for an unknown knob or parameter, a value out of its range, or a knob that is
        there twice.
    """
    if not isinstance(text, str):
        raise InputError(f"fidelity is {text!r}, expected a text such as 'mask+wavelet'")
    known = {PLAIN: {}} | {name: parameters_of(made) for name, made in KNOBS.items()}
    parts = parse_stack(text, known, "fidelity", "knob")
    names = [name for name, _ in parts]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"fidelity {shown(text)} has {name} twice: keep one of them")
    knobs = [KNOBS[name](**settings) for name, settings in parts if name != PLAIN]
    places = {kind: place for place, kind in enumerate(EARLY)}
    return FidelitySpec(tuple(sorted(knobs, key=lambda one: places.get(type(one), len(EARLY)))))


def _moments(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (3, 1, 1)."""
    variance, mean = torch.var_mean(pixels, dim=(1, 2), keepdim=True)
    return mean, (variance + VARIANCE_EPS).sqrt()
