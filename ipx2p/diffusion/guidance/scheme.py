"""What a guidance scheme is, and how it is declared (layer 1).

A stack of guidance is one linear scheme, which says how the branches are weighed, and modifiers of
six kinds. A scheme is a function or a small dataclass under `@scheme(...)`, whose fields are its
parameters; nothing else has to know about it. A modifier lives as long as one edit, so that it can
hold state; what it holds belongs to samples, and advances once per step.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ipx2p.diffusion.guidance.branches import FULL, Branch
from ipx2p.diffusion.guidance.space import Moment
from ipx2p.diffusion.schedule import Step
from ipx2p.errors import InputError

CONDITIONS = ("both", "text", "image")


@dataclass(frozen=True)
class Parameter:
    """A setting of a scheme: `low <= value <= high`, or one of `choices`."""

    name: str
    default: float | int | bool | str | None  # None is a number that is worked out
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()


def parameter(default: Any, low: float = -math.inf, high: float = math.inf, *choices: str) -> Any:
    """A dataclass field that can be set in the spec of a scheme."""
    return field(default=default, metadata={"low": low, "high": high, "choices": choices})


def on(default: str) -> Any:
    """The field that says which condition a modifier acts on."""
    return parameter(default, -math.inf, math.inf, *CONDITIONS)


@dataclass(frozen=True)
class Scheme:
    """A declared scheme: what people and tests have to know about it.

    formula: in denoised latents D unless `space` says otherwise; A and B are the terms of the
        source and of the instruction, s a scale, w the scale of one condition.
    space: where it computes; "any" for what is linear.
    scales: what guidance_scale and image_guidance_scale mean for it.
    evaluations: of the network per step; a modifier's come on top of those of the linear scheme,
        which are fewer where it changes a scale to that of the full branch.
    evaluations_once: on top, once per edit.
    plain: a spec at which it is plain dual guidance: a linear scheme equals `ip2p`, a modifier the
        linear scheme that it stands on; s_T and s_I are the edit's scales. None is never.
    plain_at: the scales at which that holds, "s_T == s_I"; "" is all.
    full_at: guidance_scale and image_guidance_scale that give the full branch; None is never.
    keeps_equal: equal predictions of all branches come out unchanged.
    needs: "weak" (a second network), "negative" (a negative instruction).
    samplers: those it can couple with; None is all.
    share: of the push of plain guidance, about what it pushes at equal scales.
    """

    name: str
    make: Callable[..., Any]
    formula: str
    paper: str
    space: str
    scales: str
    evaluations: int
    evaluations_once: int = 0
    plain: str | None = None
    plain_at: str = ""
    full_at: tuple[float, float] | None = (1.0, 1.0)
    keeps_equal: bool = True
    needs: tuple[str, ...] = ()
    samplers: tuple[str, ...] | None = None
    share: float = 1.0
    anchor: Branch = FULL  # of a linear scheme: what its terms are added to

    @property
    def is_linear(self) -> bool:
        """One of the schemes that weigh the branches; the others modify one."""
        return not is_dataclass(self.make)

    @property
    def told(self) -> str:
        """The declaration, for people."""
        once = f", and {self.evaluations_once} once per edit" if self.evaluations_once else ""
        full_at = "no scales" if self.full_at is None else "({:g}, {:g})".format(*self.full_at)
        settings = ", ".join(f"{p.name}={p.default}" for p in self.parameters.values())
        more = "" if self.is_linear else " more"
        lines = {
            "Formula": self.formula,
            "Source": self.paper,
            "Space": self.space,
            "Scales": self.scales,
            "Defaults": settings or "no parameters",
            "Network evaluations": f"{self.evaluations}{more} per step{once}",
            "Plain guidance": f"{self.plain} at {self.plain_at or 'any scales'}"
            if self.plain
            else "never",
            "Full branch": f"at {full_at} (guidance scale, image guidance scale)",
        }
        return "\n".join(f"{name}: {value}" for name, value in lines.items())

    @property
    def parameters(self) -> dict[str, Parameter]:
        """What can be set after the colon, with defaults and ranges."""
        if self.is_linear:
            settings = inspect.signature(self.make).parameters.values()
            return {
                p.name: Parameter(p.name, p.default) for p in settings if p.kind is p.KEYWORD_ONLY
            }
        return {
            f.name: Parameter(f.name, f.default, **f.metadata)
            for f in fields(self.make)
            if f.default is not MISSING and f.init
        }


def scheme(**declared: Any) -> Callable[[Callable], Callable]:
    """Declare a function or dataclass as a scheme; the name is the function's unless given.

    The declaration is added to its docstring, for `help`.
    """

    def declare(made: Callable) -> Callable:
        made.scheme = Scheme(make=made, **({"name": made.__name__} | declared))
        made.__doc__ = f"{inspect.cleandoc(made.__doc__)}\n\n{made.scheme.told}"
        return made

    return declare


def declared_in(namespace: dict[str, Any]) -> dict[str, Scheme]:
    """The schemes that a module declares, in the order of its lines."""
    found = [getattr(value, "scheme", None) for value in namespace.values()]
    return {scheme.name: scheme for scheme in found if isinstance(scheme, Scheme)}


class Term(NamedTuple):
    """factor * (plus - minus): one condition's push in a linear scheme."""

    condition: str  # "text", "image" or "both"
    factor: float  # 0 is no push: the scale less the one that gives the full branch
    plus: Branch
    minus: Branch


@dataclass(frozen=True)
class Push:
    """A term with its predictions: `factor * difference` is added to the estimate.

    All in denoised latents. plus, minus: with the condition and without it. full: with both.
    difference: plus - minus, as the modifiers before have left it. name: tells the pushes of one
    scheme apart, for what is remembered of them.
    """

    name: str
    factor: float
    difference: Tensor
    plus: Tensor
    minus: Tensor
    full: Tensor

    def changed(self, difference: Tensor, factor: float | None = None) -> "Push":
        """The same term with another difference."""
        return replace(
            self, difference=difference, factor=self.factor if factor is None else factor
        )


class Modifier:
    """What all modifiers share."""

    scheme: ClassVar[Scheme]  # its declaration

    def check(self) -> None:
        """Raise InputError for parameters that do not go together."""

    def check_base(self, base: Scheme, terms: list[Term]) -> None:
        """Raise InputError for a linear scheme that it cannot work on, or would not change."""

    def acts_on(self, condition: str) -> bool:
        """Whether it changes what belongs to this condition."""
        return getattr(self, "on", "both") in ("both", condition)


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

    last = False  # after the other modifiers of scales, wherever it stands in the stack
    replaces = False  # what modifiers before it have made of a scale

    def check_base(self, base: Scheme, terms: list[Term]) -> None:
        """It brings scales to those of the full branch."""
        if base.full_at is None:
            raise InputError(
                f"guidance {self.scheme.name} brings scales to those of the full branch, which "
                f"{base.name} never gives: take another linear scheme, as ip2p"
            )
        _check_acts(self, base, terms)

    def holds(self, step: Step) -> bool:
        """Whether there is guidance in this step at all, of the conditions that it acts on."""
        return True

    def scale(self, scale: float, neutral: float, step: Step) -> float:
        """The scale of one condition in this step; `neutral` is the one of the full branch."""
        raise NotImplementedError


class PushModifier(Modifier):
    """Changes the push of a condition, or with `joint` the sum of all pushes."""

    joint = False
    needs_full = False  # reads Push.full

    def check_base(self, base: Scheme, terms: list[Term]) -> None:
        """Its formula adds a push, scale less 1, to the full branch."""
        if base.anchor is not FULL:
            raise InputError(
                f"guidance {self.scheme.name} changes what is added to the full branch, which "
                f"{base.name} does not start from: take another linear scheme, as ip2p"
            )
        _check_acts(self, base, terms)

    def check(self) -> None:
        """Raise InputError for the sum of all pushes, of one condition."""
        if self.joint and not self.acts_on("both"):
            raise InputError(
                f"guidance {self.scheme.name}: joint=true acts on the sum of both pushes, so it "
                f"does not go with on={self.on}: leave one of them out"
            )

    def push(self, push: Push, moment: Moment) -> Push:
        """The push as this scheme has it; equal predictions (difference 0) must stay no push."""
        raise NotImplementedError


class BranchModifier(Modifier):
    """Runs further branches and adds a term made of them."""

    condition = "both"  # which one its term belongs to

    @property
    def attention_layers(self) -> Sequence[str]:
        """Beginnings of the names of layers that it changes."""
        return ()

    def branches(self, text: Term | None, weight: float, step: Step) -> list[Branch]:
        """What has to run in this step; nothing where it adds nothing.

        Args:
            text: the instruction's term, if the linear scheme has one. weight: what its difference
                is weighed with in all: 0 at guidance_scale 0.
        """
        raise NotImplementedError

    def term(
        self, denoised: dict[Branch, Tensor], text: Term | None, weight: float, moment: Moment
    ) -> Tensor | float:
        """What is added to the estimate, where there are branches."""
        raise NotImplementedError


class EstimateModifier(Modifier):
    """Changes the final estimate."""

    needs_full = False  # reads the full branch

    def mimicked(self, scales: dict[str, float]) -> dict[str, float] | None:
        """Scales at which it wants to see the linear scheme too."""
        return None

    def change(
        self, estimate: Tensor, full: Tensor | None, mimicked: Tensor | None, moment: Moment
    ) -> Tensor:
        """Denoised latents, guided -> the same, as this scheme has them."""
        raise NotImplementedError


class TextModifier(Modifier):
    """Changes what the branches are shown of the instruction."""

    def change(self, text: Tensor, noise: Callable[[int], Tensor], step: Step) -> Tensor:
        """States of the instruction, (B, 77, D), in this step."""
        raise NotImplementedError


class MaskModifier(Modifier):
    """Finds where to edit, once, and keeps the source elsewhere."""

    def timestep(self, last: int) -> float:
        """Where on the training schedule, 0..last, the source is looked at."""
        raise NotImplementedError

    def mask(self, difference: Tensor) -> Tensor:
        """full - image there, (B, 4, h, w) -> 1 where to edit, 0 where to keep, (B, 1, h, w)."""
        raise NotImplementedError
