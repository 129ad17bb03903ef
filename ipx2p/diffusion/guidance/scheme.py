"""What a guidance scheme is, and how it is declared (layer 1).

A stack of guidance is one linear scheme, which weighs the branches, and modifiers of seven kinds. A
scheme is a function, or a class whose annotated fields are its parameters, under `@scheme(...)`;
nothing else has to know about it. Schemes are frozen: what one has to remember during an edit goes
into `Moment.memory`, belongs to samples, and advances once per step.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ipx2p.diffusion.guidance.branches import FULL, Branch
from ipx2p.diffusion.guidance.space import Moment
from ipx2p.diffusion.schedule import Step
from ipx2p.errors import InputError
from ipx2p.stack import Parameter, parameter, parameters_of

CONDITIONS = ("both", "text", "image")


def on(default: str) -> Any:
    """The field that says which condition a modifier acts on."""
    return parameter(default, -math.inf, math.inf, *CONDITIONS)


@dataclass(frozen=True)
class About:
    """What people and tests need to know about a scheme; nothing acts on it.

    formula: in denoised latents D unless `space` says otherwise; A and B are the terms of the
        source and of the instruction, s a scale, w the scale of one condition.
    space: where it computes; "any" if it is linear.
    scales: what guidance_scale and image_guidance_scale mean for it.
    evaluations: of the network per step: counted for a linear scheme, added by a modifier. There
        are fewer in steps where a scale is that of the full branch.
    evaluations_once: added once per edit.
    plain: a spec at which a linear scheme equals `ip2p`, or a modifier changes nothing; s_T and s_I
        are the edit's scales. None: never.
    plain_at: the scales at which that holds, such as "s_T == s_I"; "" for all. `plain` is then the
        name alone.
    keeps_equal: equal predictions of all branches come out unchanged.
    relative_strength: push relative to ip2p at equal scales, roughly.
    """

    formula: str
    paper: str
    scales: str
    space: str = "any"
    evaluations: int = 0
    evaluations_once: int = 0
    plain: str | None = None
    plain_at: str = ""
    keeps_equal: bool = True
    relative_strength: float = 1.0


@dataclass(frozen=True)
class Scheme:
    """A declared scheme.

    full_at: guidance_scale and image_guidance_scale that give the full branch; None: never.
    needs: "weak" (a second network), "negative" (a negative instruction).
    samplers: those that it works with; None: all.
    anchor: of a linear scheme: the branch that its terms are added to.
    idle: parameters at which a modifier changes nothing; a stack then leaves it out of every step.
    """

    name: str
    make: Callable[..., Any]
    about: About
    full_at: tuple[float, float] | None
    needs: tuple[str, ...]
    samplers: tuple[str, ...] | None
    anchor: Branch
    idle: tuple[tuple[str, float | str], ...]

    @property
    def is_linear(self) -> bool:
        """Whether it weighs the branches; the other schemes modify one that does."""
        return not isinstance(self.make, type)

    @property
    def parameters(self) -> dict[str, Parameter]:
        """What can be set after the colon, with defaults and ranges."""
        if self.is_linear:
            settings = inspect.signature(self.make).parameters.values()
            return {
                p.name: Parameter(p.name, p.default) for p in settings if p.kind is p.KEYWORD_ONLY
            }
        return parameters_of(self.make)

    @property
    def summary(self) -> str:
        """The declaration, for people."""
        about = self.about
        once = f", and {about.evaluations_once} once per edit" if about.evaluations_once else ""
        full_at = "no scales" if self.full_at is None else "({:g}, {:g})".format(*self.full_at)
        settings = ", ".join(f"{p.name}={p.default}" for p in self.parameters.values())
        more = "" if self.is_linear else " more"
        plain = about.plain and f"{about.plain} at {about.plain_at or 'any scales'}"
        lines = {
            "Formula": about.formula,
            "Source": about.paper,
            "Space": about.space,
            "Scales": about.scales,
            "Defaults": settings or "no parameters",
            "Network evaluations": f"{about.evaluations}{more} per step{once}",
            "Plain guidance": plain or "never",
            "Full branch": f"at {full_at} (guidance scale, image guidance scale)",
            "Push relative to ip2p at equal scales": f"about {about.relative_strength:g}",
        }
        if about.relative_strength == 1:
            lines.popitem()
        return "\n".join(f"{name}: {value}" for name, value in lines.items())


def scheme(
    *,
    name: str | None = None,
    full_at: tuple[float, float] | None = (1.0, 1.0),
    needs: tuple[str, ...] = (),
    samplers: tuple[str, ...] | None = None,
    anchor: Branch = FULL,
    idle: dict[str, float | str] | None = None,
    **about: Any,
) -> Callable[[Callable], Callable]:
    """Declare a function or class as a scheme; a class becomes a frozen dataclass.

    The name is the function's unless given. The rest is `About` it; the summary is added to the
    docstring, for `help`.
    """

    def declare(made: Callable) -> Callable:
        made = dataclass(frozen=True)(made) if isinstance(made, type) else made
        if idle:
            about["plain"] = f"{name}:" + ",".join(f"{k}={v}" for k, v in idle.items())
        elif "plain_at" in about:
            about["plain"] = made.__name__
        if not isinstance(made, type):
            ran = {anchor}.union(*(term.branches for term in made(3.0, 5.0) if term.acts))
            about["evaluations"] = len(ran)
        declared = full_at, needs, samplers, anchor, tuple((idle or {}).items())
        made.scheme = Scheme(name or made.__name__, made, About(**about), *declared)
        made.__doc__ = f"{inspect.cleandoc(made.__doc__)}\n\n{made.scheme.summary}"
        return made

    return declare


def declared_in(namespace: dict[str, Any]) -> dict[str, Scheme]:
    """The schemes that a module declares, in the order of its lines."""
    found = [getattr(value, "scheme", None) for value in namespace.values()]
    return {scheme.name: scheme for scheme in found if isinstance(scheme, Scheme)}


class Term(NamedTuple):
    """factor * (plus - minus): one condition's push in a linear scheme, or an added one.

    condition: "text", "image" or "both". factor: 0 is no push. across: both ends of a difference;
    the part of plus - minus along it is left out.
    """

    condition: str
    factor: float
    plus: Branch
    minus: Branch
    across: tuple[Branch, Branch] | None = None

    @property
    def acts(self) -> bool:
        """Whether it pushes at all; rounding leaves factors of 1e-16."""
        return abs(self.factor) > 1e-9

    @property
    def branches(self) -> tuple[Branch, ...]:
        """What has to run for it."""
        return (self.plus, self.minus, *(self.across or ()))


@dataclass(frozen=True)
class Push:
    """A term with its predictions: `factor * difference` is added to the estimate.

    All in denoised latents. plus, minus: with the condition and without it. full: with both.
    difference: plus - minus, as the modifiers before have left it. name: tells the pushes of one
    stack apart, for what is remembered of them.
    """

    name: str
    factor: float
    difference: Tensor
    plus: Tensor
    minus: Tensor
    full: Tensor

    def changed(self, difference: Tensor, factor: float | None = None) -> "Push":
        """The same term with another difference."""
        factor = self.factor if factor is None else factor
        return replace(self, difference=difference, factor=factor)


class Modifier:
    """What all modifiers share."""

    scheme: ClassVar[Scheme]

    def check(self) -> None:
        """Raise InputError for parameters that do not go together."""

    def check_base(self, base: Scheme, terms: list[Term]) -> None:
        """Raise InputError for a linear scheme that it cannot work on, or would not change."""

    def check_window(self, hint: str = "") -> None:
        """Raise InputError unless the fields `low` and `high` span noise levels."""
        if self.low >= self.high:
            raise InputError(
                f"guidance {self.scheme.name}: low {self.low} must be below high {self.high}, in "
                f"sigma{hint}"
            )

    def acts_on(self, condition: str) -> bool:
        """Whether it changes what belongs to this condition."""
        return getattr(self, "on", "both") in ("both", condition)

    @property
    def as_factor(self) -> float | None:
        """The number by which it multiplies every push that it acts on, if that is all it does.

        1: it changes nothing. None: it does something else, or not the same in every step.
        """
        idle = self.scheme.idle
        return 1.0 if idle and all(getattr(self, name) == value for name, value in idle) else None


def _check_acts(modifier: Modifier, base: Scheme, terms: list[Term]) -> None:
    """Raise InputError for a modifier of a condition that the linear scheme does not push."""
    conditions = dict.fromkeys(term.condition for term in terms)
    if not any(map(modifier.acts_on, conditions)):
        raise InputError(
            f"guidance {modifier.scheme.name}:on={modifier.on} would change nothing: {base.name} "
            f"has no push of its own for that, set on={next(iter(conditions))}"
        )


class ScaleModifier(Modifier):
    """Changes the scales of a step, before the branches are chosen."""

    last = False  # acts after the other modifiers of scales, at any place in the stack
    replaces = False  # overrides what modifiers before it have made of a scale

    def check_base(self, base: Scheme, terms: list[Term]) -> None:
        if base.full_at is None:
            raise InputError(
                f"guidance {self.scheme.name} brings scales to those of the full branch, which "
                f"{base.name} never gives: choose another linear scheme, such as ip2p"
            )
        _check_acts(self, base, terms)

    def holds(self, step: Step) -> bool:
        """Whether there is any guidance in this step, of the conditions that it acts on."""
        return True

    def scale(self, scale: float, neutral: float, step: Step) -> float:
        """The scale of one condition in this step; `neutral` is the one of the full branch."""
        raise NotImplementedError


class PushModifier(Modifier):
    """Changes the push of a condition, or with `joint` the sum of all pushes."""

    joint = False
    needs_full = False  # reads Push.full

    def check_base(self, base: Scheme, terms: list[Term]) -> None:
        if base.anchor is not FULL:
            raise InputError(
                f"guidance {self.scheme.name} changes what is added to the full branch, which "
                f"{base.name} does not start from: choose another linear scheme, such as ip2p"
            )
        _check_acts(self, base, terms)

    def check(self) -> None:
        if self.joint and not self.acts_on("both"):
            raise InputError(
                f"guidance {self.scheme.name}: joint=true acts on the sum of both pushes, so it "
                f"does not go with on={self.on}: leave one of them out"
            )

    def push(self, push: Push, moment: Moment) -> Push:
        """The changed push; where predictions are equal (difference 0) there must be none."""
        raise NotImplementedError


class BranchModifier(Modifier):
    """Adds a term of its own, which may run further branches."""

    condition = "both"  # which one its term belongs to

    @property
    def attention_layers(self) -> Sequence[str]:
        """Layers that it changes, by their names or the beginnings of them."""
        return ()

    def term(self, text: Term | None, weight: float, step: Step) -> Term | None:
        """What is added to the estimate in this step, if anything.

        Args:
            text: the instruction's term, if the linear scheme has one. weight: the total weight of
                its difference: 0 at guidance_scale 0.
        """
        raise NotImplementedError


class EstimateModifier(Modifier):
    """Changes the final estimate, some with a reference: the full branch, or lower scales."""

    needs_full = False

    def mimicked(self, scales: dict[str, float]) -> dict[str, float] | None:
        """The lower scales, if they are the reference."""
        return None

    def change(self, estimate: Tensor, reference: Tensor | None, moment: Moment) -> Tensor:
        """Guided denoised latents -> the same, changed."""
        raise NotImplementedError


class DepthModifier(Modifier):
    """Decides how much of the network runs."""

    def is_whole(self, step: Step) -> bool:
        """Whether all of it runs in this step, or its shallow part with the deep feature kept."""
        raise NotImplementedError


class TextModifier(Modifier):
    """Changes what the branches are shown of the instruction."""

    def change(self, text: Tensor, noise: Callable[[int], Tensor], step: Step) -> Tensor:
        """States of the instruction, (B, 77, D), in this step."""
        raise NotImplementedError


class MaskModifier(Modifier):
    """Finds where to edit, once, and keeps the source elsewhere.

    level: where on the training schedule, 0..1, the branches are compared.
    """

    level: float

    def mask(self, difference: Tensor) -> Tensor:
        """full - image there, (B, 4, h, w) -> 1 where to edit, 0 where to keep, (B, 1, h, w)."""
        raise NotImplementedError
