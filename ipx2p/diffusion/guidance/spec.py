"""The specification of guidance: a stack of schemes at its scales, parsed and checked (layer 1).

It is frozen and holds no state: `plan` says what happens in a step, and what is remembered from
step to step belongs to the edit (`GuidedDenoiser`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TypeVar

from torch import Tensor

from ipx2p.diffusion.guidance.branches import FULL, NULL, TEXT, in_order
from ipx2p.diffusion.guidance.linear import coefficients
from ipx2p.diffusion.guidance.plan import StepPlan, Weights
from ipx2p.diffusion.guidance.scheme import (
    BranchModifier,
    DepthModifier,
    EstimateModifier,
    MaskModifier,
    Modifier,
    PushModifier,
    ScaleModifier,
    Scheme,
    Term,
    TextModifier,
)
from ipx2p.diffusion.schedule import Plan, Step
from ipx2p.errors import InputError
from ipx2p.stack import stack_text

Kind = TypeVar("Kind", bound=Modifier)


@dataclass(frozen=True)
class GuidanceSpec:
    """One linear scheme with its parameters, the modifiers stacked on it, and both scales.

    Kinds of modifiers act in a fixed order: scales, branches, pushes one by one, their sum
    (joint=true), added branches, the estimate, the mask. Those of one kind act as they are stacked,
    but an interval is always the last of the scales. How much of the network runs (`depth`) is the
    same for all branches of a step, unless one has no deep feature yet.

    Raises: InputError for schemes that do not go together.
    """

    base: Scheme
    settings: tuple[tuple[str, float], ...]
    modifiers: tuple[Modifier, ...]
    guidance_scale: float
    image_guidance_scale: float

    def __post_init__(self) -> None:
        for modifier in self.modifiers:
            modifier.check()
            modifier.check_base(self.base, self._terms(self.scales))
        over_time = _of(ScaleModifier, self.modifiers)
        for place, modifier in enumerate(over_time):
            for before in over_time[:place]:
                shared = any(modifier.acts_on(c) and before.acts_on(c) for c in self.scales)
                if modifier.replaces and shared:
                    raise InputError(
                        f"guidance {before.scheme.name} has no effect before "
                        f"{modifier.scheme.name}, which overrides its scales: put it after"
                    )

    def __str__(self) -> str:
        """The stack as it would be typed with every parameter that has a value."""
        return self._text(self.modifiers)

    def _text(self, modifiers: Sequence[Modifier]) -> str:
        parts = [(self.base.name, dict(self.settings))]
        for modifier in modifiers:
            settings = {field.name: getattr(modifier, field.name) for field in fields(modifier)}
            parts.append((modifier.scheme.name, settings))
        return stack_text(parts)

    @property
    def schemes(self) -> list[Scheme]:
        """What the stack is made of, the linear scheme first."""
        return [self.base, *(modifier.scheme for modifier in self.modifiers)]

    @property
    def scales(self) -> dict[str, float]:
        """The scales by condition: "text", "image", and "both" where there is one."""
        scales = {"text": self.guidance_scale, "image": self.image_guidance_scale}
        joint = dict(self.settings).get("joint_scale")
        return scales if joint is None else scales | {"both": joint}

    @property
    def mask(self) -> MaskModifier | None:
        """What decides where the edit may act."""
        return next(iter(_of(MaskModifier, self.modifiers)), None)

    @property
    def depth(self) -> DepthModifier | None:
        """What decides in which steps the whole network runs; None: in all."""
        return next(iter(_of(DepthModifier, self.acting)), None)

    def needs(self, what: str) -> list[str]:
        """Names of the schemes that need "weak" or "negative"."""
        return [scheme.name for scheme in self.schemes if what in scheme.needs]

    def check_sampler(self, sampler: str) -> None:
        """Raise InputError for a sampler that a scheme does not work with."""
        for scheme in self.schemes:
            if scheme.samplers is not None and sampler not in scheme.samplers:
                raise InputError(
                    f"guidance {scheme.name} does not work with the sampler {sampler}: choose "
                    f"{', '.join(scheme.samplers)}"
                )

    def check_plan(self, plan: Plan) -> None:
        """Raise InputError for noise levels that a scheme does not work with."""
        for step in plan:
            self.scales_at(step)

    def check_layers(self, known: Sequence[str]) -> None:
        """Raise InputError for attention layers that a network does not have."""
        for modifier in _of(BranchModifier, self.modifiers):
            layers_of(modifier.attention_layers, known)

    @cached_property
    def acting(self) -> tuple[Modifier, ...]:
        """The modifiers that change anything at these scales. The others take no part in a step."""
        left = [modifier for modifier in self.modifiers if modifier.as_factor != 1]
        pushed = {term.condition for term in self._terms(self.scales) if term.acts}
        at_rest = all(m.scheme.full_at and not isinstance(m, TextModifier) for m in left)
        if self.coefficients == {FULL: 1.0} and not pushed and at_rest:
            return ()
        if not _of(ScaleModifier, left):
            idle = [m for m in _of(PushModifier, left) if not any(map(m.acts_on, pushed))]
            left = [modifier for modifier in left if modifier not in idle]
        estimates = _of(EstimateModifier, left)
        if left == [m for m in estimates if m.mimicked(self.scales) == self.scales]:
            return ()
        return tuple(left)

    @property
    def coefficients(self) -> Weights:
        """Weights of the branches in the linear scheme, at the scales asked for."""
        return coefficients(self.base.anchor, self._terms(self.scales))

    @property
    def unused_scales(self) -> list[str]:
        """Conditions whose scale, "text" or "image", makes no difference."""
        used = {term.condition for term in self._terms(self.scales)}
        over = [m for m in _of(ScaleModifier, self.acting) if m.replaces]
        return [c for c in ("text", "image") if c not in used or any(m.acts_on(c) for m in over)]

    @property
    def effective_scales(self) -> tuple[float, float] | None:
        """(s_T, s_I) at which ip2p is exactly this stack; None if there are none."""
        if any(modifier.as_factor is None for modifier in self.acting):
            return None
        terms = []
        for term in self._terms(self.scales):
            factors = [m.as_factor for m in self.acting if m.acts_on(term.condition)]
            terms.append(term._replace(factor=term.factor * math.prod(factors)))
        weights = coefficients(self.base.anchor, terms)
        if TEXT in weights:
            return None
        return round(weights.get(FULL, 0.0), 12), round(1 - weights.get(NULL, 0.0), 12)

    @property
    def canonical(self) -> str:
        """A text that two stacks share only if they are the same computation, bit for bit.

        What a second network, a negative instruction or a sampler add is not part of it.
        """
        if not self.acting:
            return " + ".join(f"{w!r} {branch.name}" for branch, w in self.coefficients.items())
        used = {c: scale for c, scale in self.scales.items() if c not in self.unused_scales}
        return f"{self._text(self.acting)} at {used}"

    def scales_at(self, step: Step) -> dict[str, float]:
        """The scales of a step, by condition."""
        scales = self.scales
        for modifier in _of(ScaleModifier, self.acting):
            neutral = dict(zip(("text", "image", "both"), (*self.base.full_at, 1.0), strict=True))
            for condition in filter(modifier.acts_on, scales):
                scales[condition] = modifier.scale(scales[condition], neutral[condition], step)
        return scales

    def plan(self, step: Step) -> StepPlan:
        """What runs in a step, and how it is blended."""
        anchor, scales = self.base.anchor, self.scales_at(step)
        terms = self._terms(scales)
        modifiers = _of(PushModifier, self.acting)
        single = [modifier for modifier in modifiers if not modifier.joint]
        pushes = [(t, [m for m in single if m.acts_on(t.condition)]) for t in terms]
        linear = coefficients(anchor, [term for term, mine in pushes if not mine])
        pushes = [(term, mine) for term, mine in pushes if mine]
        changed = [term for term, _ in pushes if term.acts]
        joint = [m for m in modifiers if m.joint] if any(term.acts for term in terms) else []
        added = self._added(scales, step)
        estimates = [(m, self._reference(m, scales)) for m in _of(EstimateModifier, self.acting)]
        needed = dict.fromkeys(linear)
        for term in changed + added:
            needed |= dict.fromkeys(term.branches)
        for _, weights in estimates:
            needed |= weights
        if joint:
            needed[anchor] = None
        if any(modifier.needs_full for modifier in joint + (single if changed else [])):
            needed[FULL] = None
        # A term of factor 0 adds nothing, but if its branches run they still feed the momentum.
        pushes = [(term, mine) for term, mine in pushes if needed.keys() >= {*term.branches}]
        return StepPlan(in_order(needed), anchor, linear, pushes, joint, added, estimates)

    def _reference(self, modifier: EstimateModifier, scales: dict[str, float]) -> Weights:
        """Weights of what a modifier of the estimate reads beside it."""
        if modifier.needs_full:
            return {FULL: 1.0}
        lower = modifier.mimicked(scales)
        return {} if lower is None else coefficients(self.base.anchor, self._terms(lower))

    def _added(self, scales: dict[str, float], step: Step) -> list[Term]:
        """Terms of further branches, unless an interval switches them off."""
        off = [m for m in _of(ScaleModifier, self.acting) if not m.holds(step)]
        text, without = (
            next((term for term in self._terms(at) if term.condition == "text"), None)
            for at in (scales, scales | {"text": 0.0})
        )
        weight = text.factor - without.factor if text else 0.0
        terms = [
            modifier.term(text, weight, step)
            for modifier in _of(BranchModifier, self.acting)
            if not any(other.acts_on(modifier.condition) for other in off)
        ]
        return [term for term in terms if term is not None]

    def _terms(self, scales: dict[str, float]) -> list[Term]:
        joint = {"joint_scale": scales["both"]} if "both" in scales else {}
        return self.base.make(scales["text"], scales["image"], **dict(self.settings) | joint)

    def change_text(
        self, text: Tensor, noise: Callable[[int], Tensor] | None, step: Step
    ) -> Tensor:
        """States of the instruction as this step shows them."""
        for modifier in _of(TextModifier, self.acting):
            text = modifier.change(text, noise, step)
        return text


def _of(kind: type[Kind], modifiers: Sequence[Modifier]) -> list[Kind]:
    """The modifiers of a kind, in the order in which they act."""
    mine = [modifier for modifier in modifiers if isinstance(modifier, kind)]
    return sorted(mine, key=lambda modifier: getattr(modifier, "last", False))


def layers_of(beginnings: Sequence[str], known: Sequence[str]) -> list[str]:
    """Names of attention layers from beginnings of names; InputError for one that is not there."""
    found = []
    for asked in beginnings:
        begun = [name for name in known if name == asked or name.startswith(f"{asked}.")]
        if not begun:
            raise InputError(
                f"guidance: the U-Net has no attention layer {asked!r}; it has {', '.join(known)}"
            )
        found += begun
    return [*dict.fromkeys(found)]
