"""Samplers: functions that walk a plan from noise to denoised latents (layer 1).

Each takes the denoiser D(x, sigma, step), x at the first noise level, the plan and `step_noise`, a
function from the index of a step to fresh unit noise of x's shape (called only by samplers that
draw some), and returns x at the last noise level. They hold no state. x is float32, (B, 4, h, w),
in units of the clean latents: x = x0 + sigma n.
"""

import math
from collections.abc import Callable

from torch import Tensor

from ipx2p.diffusion.denoiser import Denoiser
from ipx2p.diffusion.schedule import Plan

StepNoise = Callable[[int], Tensor]


def ddpm(denoiser: Denoiser, x: Tensor, plan: Plan, step_noise: StepNoise) -> Tensor:
    """Ancestral sampling with the small posterior variance (arXiv:2006.11239, eq. 6 and 7)."""
    for step in plan:
        denoised = denoiser(x, step.sigma, step)
        # The posterior q(x' | x, x0) in sigma units; the weight of x is sigma'^2 / sigma^2.
        weight = (step.sigma_next / step.sigma) ** 2
        x = denoised + weight * (x - denoised)
        if step.sigma_next > 0:
            x = x + step.sigma_next * math.sqrt(1 - weight) * step_noise(step.index)
    return x


def ddim(denoiser: Denoiser, x: Tensor, plan: Plan, step_noise: StepNoise) -> Tensor:
    """Deterministic implicit sampling, eta 0 (arXiv:2010.02502, eq. 12)."""
    for step in plan:
        denoised = denoiser(x, step.sigma, step)
        x = _moved(x, denoised, step.sigma, step.sigma_next)
    return x


def euler(denoiser: Denoiser, x: Tensor, plan: Plan, step_noise: StepNoise) -> Tensor:
    """Euler's method on the probability flow (arXiv:2206.00364, alg. 1 without 2nd order)."""
    for step in plan:
        denoised = denoiser(x, step.sigma, step)
        x = _moved(x, denoised, step.sigma, step.sigma_next)
    return x


def euler_ancestral(denoiser: Denoiser, x: Tensor, plan: Plan, step_noise: StepNoise) -> Tensor:
    """Euler to `sigma_down`, then fresh noise up to the next level (k-diffusion, eta 1)."""
    for step in plan:
        denoised = denoiser(x, step.sigma, step)
        x = _moved(x, denoised, step.sigma, step.sigma_down)
        if step.sigma_next > 0:
            # Rounding can make the difference of two equal levels negative.
            sigma_up = math.sqrt(max(step.sigma_next**2 - step.sigma_down**2, 0.0))
            x = x + sigma_up * step_noise(step.index)
    return x


def heun(denoiser: Denoiser, x: Tensor, plan: Plan, step_noise: StepNoise) -> Tensor:
    """Euler, corrected by the slope at its end (arXiv:2206.00364, alg. 1); two evaluations a step,
    one in the step to sigma 0."""
    for step in plan:
        denoised = denoiser(x, step.sigma, step)
        x = _moved(x, denoised, step.sigma, step.sigma_next)
        if step.sigma_next > 0:
            # The mean of both slopes (x - D) / sigma, less the first: they share most of their
            # digits, so their difference is written as that of the estimates.
            change = denoiser(x, step.sigma_next, step) - denoised
            x = x + (step.sigma / step.sigma_next - 1) / 2 * change
    return x


def dpmpp_2m(denoiser: Denoiser, x: Tensor, plan: Plan, step_noise: StepNoise) -> Tensor:
    """DPM-Solver++ (2M), multistep of second order (arXiv:2211.01095, alg. 2)."""
    previous, h_previous = None, 0.0
    for step in plan:
        denoised = denoiser(x, step.sigma, step)
        ratio = step.sigma_next / step.sigma
        h = -math.log(ratio) if ratio > 0 else math.inf
        guess = denoised
        # The first step has no history; the one to sigma 0 is first order, as is one after two
        # equal noise levels (1000 steps).
        if previous is not None and h_previous > 0 and ratio > 0:
            guess = denoised + (h / h_previous) / 2 * (denoised - previous)
        x = ratio * x + (1 - ratio) * guess
        previous, h_previous = denoised, h
    return x


def _moved(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """x + (sigma_next - sigma) (x - denoised) / sigma, without the cancellation at large sigma."""
    return denoised + sigma_next / sigma * (x - denoised)


SAMPLERS: dict[str, Callable[[Denoiser, Tensor, Plan, StepNoise], Tensor]] = {
    sampler.__name__: sampler for sampler in (ddpm, ddim, euler, euler_ancestral, heun, dpmpp_2m)
}
