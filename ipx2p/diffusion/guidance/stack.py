"""A stack of guidance at work: which branches run in a step, and how they are blended (layer 1)."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from ipx2p.diffusion.guidance.branches import BRANCHES, FULL, Branch
from ipx2p.diffusion.guidance.linear import coefficients
from ipx2p.diffusion.guidance.scheme import (
    BranchModifier,
    EstimateModifier,
    MaskModifier,
    Modifier,
    Push,
    PushModifier,
    ScaleModifier,
    Scheme,
    Term,
    TextModifier,
)
from ipx2p.diffusion.guidance.space import Moment
from ipx2p.diffusion.schedule import Plan, Step
from ipx2p.errors import InputError

Kind = TypeVar("Kind", bound=Modifier)


class Guidance:
    """One linear scheme and its modifiers, for one edit (they hold state).

    Args:
        base: the linear scheme; settings: its parameters.
        modifiers: in the order of the stack; those of one kind act in this order, but for those
            of the sum of all pushes (joint=true), which come after those of one push.
    Raises: InputError for schemes that do not go together.
    """

    def __init__(
        self,
        base: Scheme,
        settings: dict[str, float],
        modifiers: Sequence[Modifier],
        *,
        guidance_scale: float,
        image_guidance_scale: float,
    ) -> None:
        self.base = base
        self.modifiers = modifiers
        self.settings = settings
        self.scales = {"text": guidance_scale, "image": image_guidance_scale}
        if "joint_scale" in settings:
            self.scales["both"] = settings["joint_scale"]
        # An interval is the last word on the scales of a step.
        self._over_time = sorted(self._of(ScaleModifier), key=lambda modifier: modifier.last)
        pushes = self._of(PushModifier)
        self._pushes = [modifier for modifier in pushes if not modifier.joint]
        self._joint = [modifier for modifier in pushes if modifier.joint]
        self._extra = self._of(BranchModifier)
        self._estimates = self._of(EstimateModifier)
        for modifier in modifiers:
            modifier.check_base(base, self._terms(self.scales))
        self._check_order()

    def _of(self, kind: type[Kind]) -> list[Kind]:
        return [modifier for modifier in self.modifiers if isinstance(modifier, kind)]

    def _check_order(self) -> None:
        for place, modifier in enumerate(self._over_time):
            for before in self._over_time[:place]:
                shared = any(modifier.acts_on(c) and before.acts_on(c) for c in self.scales)
                if modifier.replaces and shared:
                    raise InputError(
                        f"guidance {before.scheme.name} has no effect before "
                        f"{modifier.scheme.name}, which sets scales anew: put it behind"
                    )

    @property
    def schemes(self) -> list[Scheme]:
        """What the stack is made of, the linear scheme first."""
        return [self.base, *(modifier.scheme for modifier in self.modifiers)]

    def needs(self, what: str) -> list[str]:
        """Names of the schemes that need "weak" or "negative"."""
        return [scheme.name for scheme in self.schemes if what in scheme.needs]

    @property
    def unused_scales(self) -> list[str]:
        """Conditions whose scale changes nothing, whatever it is."""
        some = self.scales | {"text": 2.0, "image": 3.0}  # at 0, in `nested`, one hides the other
        set_anew = [modifier for modifier in self._over_time if modifier.replaces]
        return [
            condition
            for condition in ("text", "image")
            if self._terms(some | {condition: 5.0}) == self._terms(some)
            or any(modifier.acts_on(condition) for modifier in set_anew)
        ]

    @property
    def effective_scales(self) -> dict[str, float]:
        """Scales at which the linear scheme alone pushes about as much, by condition."""
        scales = dict(self.scales)
        for condition in ("image", "text"):  # in `nested` the text's push hangs on both
            acting = [m for m in self.modifiers if m.acts_on(condition)]
            share = math.prod(modifier.scheme.share for modifier in acting)
            if share == 1 or condition in self.unused_scales:
                continue
            # A term's factor is a straight line over its own scale.
            at_0, at_1 = (
                self._factor(condition, scales | {condition: scale}) for scale in (0.0, 1.0)
            )
            wanted = share * self._factor(condition, self.scales)
            if at_1 != at_0:
                scales[condition] = (wanted - at_0) / (at_1 - at_0)
        return scales

    def _factor(self, condition: str, scales: dict[str, float]) -> float:
        return next(t.factor for t in self._terms(scales) if t.condition == condition)

    @property
    def mask(self) -> MaskModifier | None:
        """What decides where the edit may act."""
        return next(iter(self._of(MaskModifier)), None)

    def check_sampler(self, sampler: str) -> None:
        """Raise InputError for a sampler that a scheme cannot couple with."""
        for scheme in self.schemes:
            if scheme.samplers is not None and sampler not in scheme.samplers:
                raise InputError(
                    f"guidance {scheme.name} cannot couple with the sampler {sampler}: take "
                    f"{', '.join(scheme.samplers)}"
                )

    def check_plan(self, plan: Plan) -> None:
        """Raise InputError for noise levels that a scheme cannot couple with."""
        for step in plan:
            self.scales_at(step)

    def check_layers(self, known: Sequence[str]) -> None:
        """Raise InputError for attention layers that a network does not have."""
        for modifier in self._extra:
            layers_of(modifier.attention_layers, known)

    @property
    def coefficients(self) -> dict[Branch, float]:
        """Weights of the branches in the linear scheme, at the scales asked for."""
        return coefficients(self.base.anchor, self._terms(self.scales))

    def scales_at(self, step: Step) -> dict[str, float]:
        """The scales of a step by condition: "text", "image", and "both" where there is one."""
        if not self._over_time:
            return self.scales
        neutral = dict(zip(("text", "image", "both"), (*self.base.full_at, 1.0), strict=True))
        scales = dict(self.scales)
        for modifier in self._over_time:
            for condition, scale in scales.items():
                if modifier.acts_on(condition):
                    scales[condition] = modifier.scale(scale, neutral[condition], step)
        return scales

    def branches(self, sigma: float, step: Step) -> list[Branch]:
        """The branches to run at this noise level of this step: only those that matter."""
        scales = self.scales_at(step)
        terms = self._terms(scales)
        linear, pushed = self._split(terms)
        needed = dict.fromkeys(coefficients(self.base.anchor, linear))
        changed = [term for term in pushed if acts(term)]
        for term in changed:
            needed |= dict.fromkeys((term.plus, term.minus))
        changing = list(self._pushes) if changed else []
        if self._joint and any(map(acts, terms)):
            needed[self.base.anchor] = None
            changing += self._joint
        if any(modifier.needs_full for modifier in (*changing, *self._estimates)):
            needed[FULL] = None
        for modifier in self._extra_at(step):
            needed |= dict.fromkeys(modifier.branches(*self._text_term(scales), step))
        for modifier in self._estimates:
            mimicked = modifier.mimicked(scales)
            if mimicked is not None:
                needed |= coefficients(self.base.anchor, self._terms(mimicked))
        order = [*BRANCHES.values()]
        return sorted(needed, key=lambda b: order.index(b) if b in order else len(order))

    def blend(self, denoised: dict[Branch, Tensor], x: Tensor, sigma: float, step: Step) -> Tensor:
        """Denoised latents of the branches at x -> the guided ones, (B, 4, h, w), float32."""
        moment, scales = Moment(x, sigma, step), self.scales_at(step)
        terms = self._terms(scales)
        estimate = self._pushed(denoised, terms, moment)
        for modifier in self._extra_at(step):
            text, weight = self._text_term(scales)
            if modifier.branches(text, weight, step):
                estimate = estimate + modifier.term(denoised, text, weight, moment)
        for modifier in self._estimates:
            mimicked = modifier.mimicked(scales)
            if mimicked is not None:
                mimicked = self._weighed(denoised, self._terms(mimicked))
            estimate = modifier.change(estimate, denoised.get(FULL), mimicked, moment)
        return estimate

    def _extra_at(self, step: Step) -> list[BranchModifier]:
        """Those that no interval switches off."""
        off = [modifier for modifier in self._over_time if not modifier.holds(step)]
        return [m for m in self._extra if not any(other.acts_on(m.condition) for other in off)]

    def _terms(self, scales: dict[str, float]) -> list[Term]:
        settings = dict(self.settings)
        if "both" in scales:
            settings["joint_scale"] = scales["both"]
        return self.base.make(scales["text"], scales["image"], **settings)

    def _text_term(self, scales: dict[str, float]) -> tuple[Term | None, float]:
        """The instruction's term, and what its difference is weighed with in all."""
        text, without = (
            next((term for term in self._terms(at) if term.condition == "text"), None)
            for at in (scales, scales | {"text": 0.0})
        )
        return text, text.factor - without.factor if text else 0.0

    def _split(self, terms: list[Term]) -> tuple[list[Term], list[Term]]:
        """Terms that stay as they are, and those that a modifier acts on one by one."""
        pushed = [t for t in terms if any(m.acts_on(t.condition) for m in self._pushes)]
        return [term for term in terms if term not in pushed], pushed

    def _weighed(self, denoised: dict[Branch, Tensor], terms: list[Term]) -> Tensor:
        weights = coefficients(self.base.anchor, terms)
        return sum(weight * denoised[branch] for branch, weight in weights.items())

    def _pushed(self, denoised: dict[Branch, Tensor], terms: list[Term], moment: Moment) -> Tensor:
        """The anchor and its pushes, as the modifiers have them."""
        linear, pushed = self._split(terms)
        estimate = self._weighed(denoised, linear)
        for term in pushed:
            # With a factor of 0 it adds nothing, but what has run still feeds the momentum.
            if term.plus in denoised and term.minus in denoised:
                push = self._push(denoised, term)
                for modifier in self._pushes:
                    if modifier.acts_on(term.condition):
                        push = modifier.push(push, moment)
                if acts(term):
                    estimate = estimate + push.factor * push.difference
        if not self._joint or not any(map(acts, terms)):
            return estimate
        anchor = denoised[self.base.anchor]
        total = estimate - anchor
        push = Push("joint", 1.0, total, anchor, anchor - total, denoised.get(FULL, anchor))
        for modifier in self._joint:
            push = modifier.push(push, moment)
        return anchor + push.factor * push.difference

    def _push(self, denoised: dict[Branch, Tensor], term: Term) -> Push:
        plus, minus = denoised[term.plus], denoised[term.minus]
        name = f"{term.plus.name} - {term.minus.name}"
        return Push(name, term.factor, plus - minus, plus, minus, denoised.get(FULL, plus))

    def change_text(
        self, text: Tensor, noise: Callable[[int], Tensor] | None, step: Step
    ) -> Tensor:
        """States of the instruction as this step shows them."""
        for modifier in self._of(TextModifier):
            text = modifier.change(text, noise, step)
        return text


def acts(term: Term) -> bool:
    """Whether a term pushes at all; rounding leaves factors of 1e-16."""
    return abs(term.factor) > 1e-9


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
