"""Prediction spaces, and norms and projections per sample (layer 1).

Guidance blends denoised latents, estimates D of x0 at x = x0 + sigma n. Ratios, norms and
projections depend on the space they are taken in. At given x and sigma the spaces are affine in
each other:

    eps = (x - D) / sigma,    v = (alpha^2 x - D) / s,    x0 = D,
    with alpha = 1 / sqrt(1 + sigma^2), s = sigma alpha (v: arXiv:2202.00512, app. D).

So a difference of predictions is the difference of denoised latents times a number.
All tensors are (B, ...) in float32; norms run over all but the first dimension.
"""

import math
from dataclasses import dataclass, field

from torch import Tensor

from ipx2p.diffusion.schedule import Step

TINY = 1e-12  # avoids 0 / 0; sums of squares of latents are near 1e4


@dataclass(frozen=True)
class Moment:
    """One evaluation: noisy latents x at noise level sigma, in this step of the sampler.

    memory: what schemes remember during an edit, under keys of their own.
    """

    x: Tensor
    sigma: float
    step: Step
    memory: dict = field(default_factory=dict)

    def per_denoised(self, space: str) -> float:
        """What a difference of denoised latents is multiplied by to be one of predictions."""
        return {
            "x0": 1.0,
            "eps": -1 / self.sigma,
            "v": -math.sqrt(1 + self.sigma**2) / self.sigma,
        }[space]

    def prediction(self, denoised: Tensor, space: str) -> Tensor:
        """Denoised latents, converted to a prediction in a space."""
        if space == "x0":
            return denoised
        kept = self.x if space == "eps" else self.x / (1 + self.sigma**2)
        return (denoised - kept) * self.per_denoised(space)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, (B, 1, 1, 1)."""
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)


def norm(a: Tensor) -> Tensor:
    """Euclidean norm of each sample, (B, 1, 1, 1)."""
    return dot(a, a).sqrt()


def std(a: Tensor) -> Tensor:
    """Standard deviation of each sample, (B, 1, 1, 1)."""
    return a.std(dim=tuple(range(1, a.ndim)), keepdim=True)


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b for b >= 0, finite where b is 0."""
    return a / b.clamp(min=TINY)


def project_off(a: Tensor, base: Tensor, eta: float = 0.0) -> Tensor:
    """Each sample of a with its part along base times `eta`; unchanged where base is 0."""
    return a - (1 - eta) * ratio(dot(a, base), dot(base, base)) * base
