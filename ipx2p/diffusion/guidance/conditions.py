"""Changes of the conditions: noise on the instruction (CADS), a relevance mask (layer 1)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ipx2p.diffusion.guidance.scheme import MaskModifier, TextModifier, scheme
from ipx2p.diffusion.guidance.space import ratio
from ipx2p.diffusion.schedule import Step
from ipx2p.errors import InputError
from ipx2p.stack import parameter


@scheme(
    name="cads",
    formula="y' = sqrt(g) y + scale sqrt(1 - g) n, g(t) = 1 up to tau1, 0 from tau2 on (t: the "
    "share of steps left); restored to the mean and spread of y, mixed by psi",
    paper="arXiv:2310.17347",
    scales="as in the linear scheme; the null text and the source stay clean",
    idle={"tau1": 1.0, "tau2": 1.0},
)
class ConditionAnnealing(TextModifier):
    """Condition-annealed sampling: noise on the text states in early steps, for variety.

    The noise belongs to the edit's seed and the step. Defaults: those of a published port for
    SD 1.5.
    """

    tau1: float = parameter(0.6, 0.0, 1.0)
    tau2: float = parameter(0.9, 0.0, 1.0)
    scale: float = parameter(0.25, 0.0, 10.0)
    psi: float = parameter(1.0, 0.0, 1.0)

    def check(self) -> None:
        if self.tau1 > self.tau2:
            raise InputError(f"guidance cads: tau1 {self.tau1} must not be above tau2 {self.tau2}")

    def change(self, text: Tensor, noise: Callable[[int], Tensor], step: Step) -> Tensor:
        time = 1 - step.index / step.count
        if time <= self.tau1:
            return text
        kept = max((self.tau2 - time) / (self.tau2 - self.tau1), 0.0) if time < self.tau2 else 0.0
        clean = text.float()
        noised = math.sqrt(kept) * clean + self.scale * math.sqrt(1 - kept) * noise(step.index)
        means, spreads = zip(*(_mean_and_std(y) for y in (clean, noised)), strict=True)
        restored = ratio(noised - means[1], spreads[1]) * spreads[0] + means[0]
        return (self.psi * restored + (1 - self.psi) * noised).to(text.dtype)


def _mean_and_std(y: Tensor) -> tuple[Tensor, Tensor]:
    return y.mean(dim=(1, 2), keepdim=True), y.std(dim=(1, 2), keepdim=True)


@scheme(
    name="mask",
    formula="m = |full - image| summed over channels, at `level` of the schedule, clipped above "
    "Q3 + fence (Q3 - Q1), brought to 0 ... 1, > threshold; m e + (1 - m) source",
    paper="arXiv:2308.08947",
    scales="as in the linear scheme, inside the mask; outside, the source stays",
    evaluations_once=2,
    full_at=None,
    keeps_equal=False,
)
class RelevanceMask(MaskModifier):
    """Watch your steps: edit only where the instruction matters, found on the noised source.

    The authors put the noised source back outside the mask after each step. For a mask of 0 and 1,
    putting the source into the estimate there does the same with every sampler: x = source +
    sigma n goes to source + sigma' n, with n = (x - source) / sigma of the first step. So the
    background has the new noise level; the authors' is one step behind. Like theirs, an edit with a
    mask starts from the noised source, not from pure noise. If predictions are equal nothing is
    relevant, and the result is the source. `threshold` 0 leaves the mask soft.
    """

    threshold: float = parameter(0.5, 0.0, 1.0)
    level: float = parameter(0.8, 0.01, 1.0)
    fence: float = parameter(1.5, 0.0, 100.0)

    def mask(self, difference: Tensor) -> Tensor:
        relevance = difference.abs().sum(dim=1).flatten(1)
        quartiles = torch.tensor([0.25, 0.75], device=relevance.device)
        first, third = relevance.quantile(quartiles, dim=1, keepdim=True)
        relevance = torch.minimum(relevance, third + self.fence * (third - first))
        low = relevance.amin(dim=1, keepdim=True)
        mask = ratio(relevance - low, relevance.amax(dim=1, keepdim=True) - low)
        if self.threshold:
            mask = (mask > self.threshold).float()
        return mask.unflatten(1, difference.shape[-2:])[:, None]
