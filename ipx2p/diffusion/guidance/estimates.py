"""Changes of the final estimate: rescaling, thresholds (layer 1)."""

import math

import torch
from torch import Tensor

from ipx2p.diffusion.guidance.scheme import EstimateModifier, scheme
from ipx2p.diffusion.guidance.space import TINY, Moment, ratio, std
from ipx2p.stack import parameter


@scheme(
    name="rescale",
    formula="phi e std(full) / std(e) + (1 - phi) e, per sample",
    paper="arXiv:2305.08891, sec. 3.4",
    space="v",
    scales="as in the linear scheme; the full branch is the reference for both conditions",
    idle={"phi": 0.0},
)
class Rescale(EstimateModifier):
    """CFG rescale: give the estimate the standard deviation of the full branch."""

    phi: float = parameter(0.7, 0.0, 1.0)
    needs_full = True

    def change(self, estimate: Tensor, reference: Tensor | None, moment: Moment) -> Tensor:
        guided = moment.prediction(estimate, "v")
        factor = ratio(std(moment.prediction(reference, "v")), std(guided))
        change = self.phi * (factor - 1) * guided
        return estimate + change / moment.per_denoised("v")


@scheme(
    name="dynamic_threshold",
    formula="q = max(bound, quantile of |e|); e clipped to +-q, times bound / q, per sample",
    paper="arXiv:2205.11487, sec. 2.3",
    space="x0",
    scales="as in the linear scheme",
    plain="dynamic_threshold:bound=1e6",
    full_at=None,
    keeps_equal=False,
)
class DynamicThreshold(EstimateModifier):
    """Dynamic thresholding: squeeze estimates that leave the range of pictures back into it.

    Pixels have the bound 1; latents have none, so 4 standard deviations are our own choice.
    """

    quantile: float = parameter(0.995, 0.0, 1.0)
    bound: float = parameter(4.0, 1e-3, 1e6)

    def change(self, estimate: Tensor, reference: Tensor | None, moment: Moment) -> Tensor:
        reach = estimate.abs().flatten(1).quantile(self.quantile, dim=1).view(-1, 1, 1, 1)
        reach = reach.clamp(min=self.bound)
        return estimate.clamp(-reach, reach) * (self.bound / reach)


@scheme(
    name="mimic",
    formula="M: e at the mimicked scales; per channel, about its mean: "
    "R = max(max |M|, quantile of |e|); e clipped to +-R, times max |M| / R",
    paper="sd-dynamic-thresholding; no paper",
    space="x0",
    scales="as in the linear scheme; the range is that at scale and image_scale, but at most the "
    "edit's own; joint_scale is limited by scale",
    plain="mimic:scale=1e6",
)
class MimicScale(EstimateModifier):
    """Mimic scale: the push of a high scale, in the range of values of a lower one.

    The authors mimic 7 at scales of 15 to 30 of a text-to-image model.
    """

    scale: float = parameter(4.0, 1.0, 1e6)
    image_scale: float | None = parameter(None, 1.0, 1e6)  # None: the edit's own
    quantile: float = parameter(1.0, 0.0, 1.0)

    def mimicked(self, scales: dict[str, float]) -> dict[str, float]:
        image = scales["image"] if self.image_scale is None else self.image_scale
        most = {"text": self.scale, "image": image, "both": self.scale}
        return {condition: min(most[condition], scale) for condition, scale in scales.items()}

    def change(self, estimate: Tensor, reference: Tensor | None, moment: Moment) -> Tensor:
        mean = estimate.mean(dim=(2, 3), keepdim=True)
        centred = estimate - mean
        target = (reference - reference.mean(dim=(2, 3), keepdim=True)).abs().amax((2, 3), True)
        reach = centred.abs().flatten(2).quantile(self.quantile, dim=2)[..., None, None]
        reach = torch.maximum(target, reach).clamp(min=math.sqrt(TINY))
        return centred.clamp(-reach, reach) * (target / reach) + mean
