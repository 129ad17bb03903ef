"""Samplers: functions that walk a plan from noise to denoised latents (layer 1).

A sampler is a function without state, under `@sampler(...)`, which states its traits. It takes the
denoiser D(x, sigma, step), x at the first noise level, the plan, and `step_noise`, which gives
fresh unit noise of x's shape for the index of a step (used only by samplers that add noise). It
returns x at the last noise level. x is float32, (B, 4, h, w), in units of the clean latents:
x = x0 + sigma n.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ipx2p.diffusion.denoiser import Denoiser
from ipx2p.diffusion.schedule import Plan, Schedule
from ipx2p.errors import InputError
from ipx2p.names import check_names

KARRAS_RHO = 7.0

StepNoise = Callable[[int], Tensor]
Sampler = Callable[[Denoiser, Tensor, Plan, StepNoise], Tensor]

SAMPLERS: dict[str, Sampler] = {}


@dataclass(frozen=True)
class SamplerTraits:
    """What the plan depends on; as in the published scheduler of the same name.

    full_variance: starts at noise of variance sigma^2 + 1, not sigma^2.
    whole_timesteps: visits whole timesteps with the linspace spacing.
    ends_at_first_sigma: ends at the noise of timestep 0, not at sigma 0.
    ancestral: each step ends in fresh noise.
    drop_last_point: spacings that are laid out with one more point, where the sampler ends. (For
        DDIM with linspace and karras this is our own choice: otherwise its last step would go from
        timestep 0 to timestep 0 and do nothing.)
    """

    full_variance: bool = False
    whole_timesteps: bool = False
    ends_at_first_sigma: bool = False
    ancestral: bool = False
    drop_last_point: tuple[str, ...] = ()


def sampler(**traits: bool | tuple[str, ...]) -> Callable[[Sampler], Sampler]:
    """Add a sampler to `SAMPLERS`, under the name of its function, with its traits."""

    def declare(walk: Sampler) -> Sampler:
        walk.traits = SamplerTraits(**traits)
        SAMPLERS[walk.__name__] = walk
        return walk

    return declare


@sampler(full_variance=True, whole_timesteps=True, ancestral=True)
def ddpm(denoiser: Denoiser, x: Tensor, plan: Plan, step_noise: StepNoise) -> Tensor:
    """Ancestral sampling with the small posterior variance (arXiv:2006.11239, eq. 6 and 7)."""
    for step in plan:
        denoised = denoiser(x, step.sigma, step)
        # The posterior q(x' | x, x0) in units of sigma; the weight of x is sigma'^2 / sigma^2.
        weight = (step.sigma_next / step.sigma) ** 2
        x = denoised + weight * (x - denoised)
        if step.sigma_next > 0:
            x = x + step.sigma_next * math.sqrt(1 - weight) * step_noise(step.index)
    return x


@sampler(
    full_variance=True,
    whole_timesteps=True,
    ends_at_first_sigma=True,
    drop_last_point=("linspace", "karras"),
)
def ddim(denoiser: Denoiser, x: Tensor, plan: Plan, step_noise: StepNoise) -> Tensor:
    """Deterministic implicit sampling, eta 0 (arXiv:2010.02502, eq. 12): Euler's steps."""
    return euler(denoiser, x, plan, step_noise)


@sampler()
def euler(denoiser: Denoiser, x: Tensor, plan: Plan, step_noise: StepNoise) -> Tensor:
    """Euler's method on the probability flow (arXiv:2206.00364, alg. 1 without 2nd order)."""
    for step in plan:
        denoised = denoiser(x, step.sigma, step)
        x = _moved(x, denoised, step.sigma, step.sigma_next)
    return x


@sampler(ancestral=True)
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


@sampler()
def heun(denoiser: Denoiser, x: Tensor, plan: Plan, step_noise: StepNoise) -> Tensor:
    """Euler, corrected by the slope at its end (arXiv:2206.00364, alg. 1).

    Two evaluations per step, one in the step to sigma 0. A step amplifies rounding by
    sigma / (2 sigma_next), so avoid two steps of linspace, which span all levels at once.
    """
    for step in plan:
        denoised = denoiser(x, step.sigma, step)
        x = _moved(x, denoised, step.sigma, step.sigma_next)
        if step.sigma_next > 0:
            # Half the change of the slope (x - D) / sigma. Both slopes share most of their digits,
            # so their difference is written in terms of the estimates.
            change = denoiser(x, step.sigma_next, step) - denoised
            x = x + (step.sigma / step.sigma_next - 1) / 2 * change
    return x


@sampler(full_variance=True, whole_timesteps=True, drop_last_point=("linspace", "leading"))
def dpmpp_2m(denoiser: Denoiser, x: Tensor, plan: Plan, step_noise: StepNoise) -> Tensor:
    """DPM-Solver++ (2M), multistep of second order (arXiv:2211.01095, alg. 2)."""
    previous, h_previous = None, 0.0
    for step in plan:
        denoised = denoiser(x, step.sigma, step)
        ratio = step.sigma_next / step.sigma
        h = -math.log(ratio) if ratio > 0 else math.inf
        guess = denoised
        # First order without a history, to sigma 0, and after two equal noise levels (1000 steps).
        if previous is not None and h_previous > 0 and ratio > 0:
            guess = denoised + (h / h_previous) / 2 * (denoised - previous)
        x = ratio * x + (1 - ratio) * guess
        previous, h_previous = denoised, h
    return x


def _moved(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """x + (sigma_next - sigma) (x - denoised) / sigma, without cancellation at large sigma."""
    return denoised + sigma_next / sigma * (x - denoised)


def make_plan(schedule: Schedule, name: str, spacing: str, num_steps: int) -> Plan:
    """The noise levels that a sampler visits; its traits decide where it starts and ends.

    With the leading spacing every sampler starts at the full variance, as published. Karras sigmas
    keep their fractional timesteps, even where published code rounds them.

    Raises: InputError for an unknown sampler or spacing, or steps outside 1..1000.
    """
    check_names(sampler=name, spacing=spacing)
    total = schedule.config.num_train_timesteps
    if not 1 <= num_steps <= total:
        raise InputError(f"{num_steps} steps asked for, expected 1 to {total}")
    traits = SAMPLERS[name].traits
    timesteps = _timesteps(schedule, traits, spacing, num_steps)
    sigmas = [schedule.sigma(timestep) for timestep in timesteps]
    full_variance = spacing == "leading" or traits.full_variance
    return Plan(
        sigmas=(*sigmas, schedule.sigma(0) if traits.ends_at_first_sigma else 0.0),
        timesteps=tuple(timesteps),
        start_factor=math.sqrt(1 + sigmas[0] ** 2) if full_variance else sigmas[0],
        ancestral=traits.ancestral,
    )


def _timesteps(
    schedule: Schedule, traits: SamplerTraits, spacing: str, num_steps: int
) -> list[float]:
    total, last = schedule.config.num_train_timesteps, schedule.last_timestep
    if num_steps == 1:
        return [float(last)]
    points = num_steps + (spacing in traits.drop_last_point)
    falling = range(points - 1, -1, -1)
    if spacing == "leading":
        stride = max(total // points, 1)
        timesteps = [stride * i + schedule.config.steps_offset for i in falling]
    elif spacing == "trailing":
        timesteps = [round(total * (i + 1) / points) - 1 for i in falling]
    elif spacing == "karras":
        # arXiv:2206.00364, eq. 5
        high, low = (schedule.sigma(t) ** (1 / KARRAS_RHO) for t in (last, 0))
        roots = [low + (high - low) * i / (points - 1) for i in falling]
        timesteps = [schedule.timestep(root**KARRAS_RHO) for root in roots]
    else:
        timesteps = [last * i / (points - 1) for i in falling]
        if traits.whole_timesteps:
            timesteps = [round(timestep) for timestep in timesteps]
    return [float(min(max(timestep, 0), last)) for timestep in timesteps[:num_steps]]
