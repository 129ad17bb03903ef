"""The plan of one step: which branches run, and how they are blended (layer 1)."""

from dataclasses import dataclass

from torch import Tensor

from ipx2p.diffusion.guidance.branches import FULL, Branch
from ipx2p.diffusion.guidance.scheme import EstimateModifier, Push, PushModifier, Term
from ipx2p.diffusion.guidance.space import Moment, project_off

Weights = dict[Branch, float]


@dataclass(frozen=True)
class StepPlan:
    """What guidance does in one step of a sampler.

    branches: those to run, and no others.
    linear: weights of the anchor and of the terms that no modifier acts on one by one.
    pushes: the other terms, each with its modifiers. joint: modifiers of the sum of all pushes.
    added: terms of further branches.
    estimates: modifiers of the result, each with the weights of the reference that it reads.
    """

    branches: list[Branch]
    anchor: Branch
    linear: Weights
    pushes: list[tuple[Term, list[PushModifier]]]
    joint: list[PushModifier]
    added: list[Term]
    estimates: list[tuple[EstimateModifier, Weights]]

    def blend(self, denoised: dict[Branch, Tensor], moment: Moment) -> Tensor:
        """Denoised latents of the branches -> the guided ones, (B, 4, h, w), float32."""
        estimate = _weighed(denoised, self.linear)
        for term, modifiers in self.pushes:
            plus, minus = denoised[term.plus], denoised[term.minus]
            name = f"{term.plus.name} - {term.minus.name}"
            full = denoised.get(FULL, plus)
            push = Push(name, term.factor, plus - minus, plus, minus, full)
            for modifier in modifiers:
                push = modifier.push(push, moment)
            if term.acts:
                estimate = estimate + push.factor * push.difference
        if self.joint:
            anchor = denoised[self.anchor]
            total = estimate - anchor
            push = Push("joint", 1.0, total, anchor, anchor - total, denoised.get(FULL, anchor))
            for modifier in self.joint:
                push = modifier.push(push, moment)
            estimate = anchor + push.factor * push.difference
        for term in self.added:
            difference = denoised[term.plus] - denoised[term.minus]
            if term.across is not None:
                plus, minus = (denoised[branch] for branch in term.across)
                difference = project_off(difference, plus - minus)
            estimate = estimate + term.factor * difference
        for modifier, weights in self.estimates:
            reference = _weighed(denoised, weights) if weights else None
            estimate = modifier.change(estimate, reference, moment)
        return estimate


def _weighed(denoised: dict[Branch, Tensor], weights: Weights) -> Tensor:
    return sum(weight * denoised[branch] for branch, weight in weights.items())
