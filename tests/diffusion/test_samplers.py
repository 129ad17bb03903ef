"""Samplers against exact solutions and against one another.

For data that are a Gaussian of variance c^2 the best denoiser is x c^2 / (c^2 + sigma^2), and the
probability flow ends at x_start c / sqrt(c^2 + sigma_start^2) (arXiv:2206.00364, app. B).
"""

import math
from dataclasses import replace

import pytest
import torch

from ipx2p.diffusion.samplers import (
    SAMPLERS,
    ddim,
    ddpm,
    dpmpp_2m,
    euler,
    euler_ancestral,
    heun,
    make_plan,
)
from ipx2p.diffusion.schedule import Schedule, ScheduleConfig
from ipx2p.names import SPACINGS

C = 0.5
SCHEDULE = Schedule()


def gaussian_denoiser(x, sigma, step):
    return x * C**2 / (C**2 + sigma**2)


def noise_of(index):
    return torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(index)).double()


def start(plan):
    return noise_of(999) * plan.start_factor


def error(sampler, num_steps):
    """Distance from the exact end of the probability flow, at the last level above 0."""
    plan = make_plan(SCHEDULE, sampler.__name__, "karras", num_steps + 1)
    plan = replace(plan, sigmas=plan.sigmas[:-1], timesteps=plan.timesteps[:-1])
    end = sampler(gaussian_denoiser, start(plan), plan, noise_of)
    exact = start(plan) * math.sqrt((C**2 + plan.sigmas[-1] ** 2) / (C**2 + plan.sigmas[0] ** 2))
    return (end - exact).abs().max().item()


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (ddim, 1), (heun, 2), (dpmpp_2m, 2)])
def test_deterministic_samplers_converge_with_their_order(sampler, order):
    coarse, fine = error(sampler, 40), error(sampler, 160)
    assert fine < 0.05
    assert coarse / fine > 0.6 * 4**order


@pytest.mark.parametrize("sampler", [ddpm, ddim, euler, euler_ancestral, heun])
def test_a_later_start_at_what_a_whole_run_had_there_is_the_rest_of_that_run(sampler):
    plan = make_plan(SCHEDULE, sampler.__name__, "linspace", 10)
    seen = {}

    def recording(x, sigma, step):
        seen.setdefault(step, x)  # at the start of the step
        return gaussian_denoiser(x, sigma, step)

    whole = sampler(recording, start(plan), plan, noise_of)
    late = plan.from_source(0.34)
    assert (len(late), late.skipped, late.end_factor) == (3, 7, plan.end_factor)
    assert [*late] == [*plan][7:]
    rest = sampler(gaussian_denoiser, seen[next(iter(late))], late, noise_of)
    assert torch.equal(rest, whole)


@pytest.mark.parametrize(
    ("strength", "count"), [(1.0, 20), (0.99, 20), (0.8, 16), (0.7, 14), (0.02, 1), (0.0, 1)]
)
def test_a_later_start_takes_the_share_of_the_steps_and_at_1_changes_nothing(strength, count):
    plan = make_plan(SCHEDULE, "euler", "linspace", 20)
    late = plan.from_source(strength)
    assert len(late) == len([*late]) == count and late.sigmas == plan.sigmas[20 - count :]
    assert late == plan if strength == 1 else late.start_factor is None
    assert [step.count for step in late] == [20] * count


@pytest.mark.parametrize("sampler", [ddpm, euler_ancestral])
def test_ancestral_samplers_reach_the_variance_of_the_data(sampler):
    plan = make_plan(SCHEDULE, sampler.__name__, "trailing", 1000)

    def noise(index):
        return torch.randn(20_000, generator=torch.Generator().manual_seed(index)).double()

    end = sampler(gaussian_denoiser, noise(999) * plan.start_factor, plan, noise)
    assert end.std().item() == pytest.approx(C, rel=0.03)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_posterior_is_euler_ancestral(spacing):
    plan = make_plan(SCHEDULE, "ddpm", spacing, 20)
    x = start(plan)
    one = ddpm(gaussian_denoiser, x, plan, noise_of)
    other = euler_ancestral(gaussian_denoiser, x, plan, noise_of)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_ddim_is_euler_on_the_same_plan():
    plan = make_plan(SCHEDULE, "ddim", "leading", 20)
    one = ddim(gaussian_denoiser, start(plan), plan, noise_of)
    other = euler(gaussian_denoiser, start(plan), plan, noise_of)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_euler_ancestral_without_noise_is_euler():
    plan = replace(make_plan(SCHEDULE, "euler_ancestral", "trailing", 20), ancestral=False)
    one = euler_ancestral(gaussian_denoiser, start(plan), plan, noise_of)
    other = euler(gaussian_denoiser, start(plan), plan, noise_of)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_ends_finite_for_any_number_of_steps(name, spacing, num_steps):
    plan = make_plan(SCHEDULE, name, spacing, num_steps)
    end = SAMPLERS[name](gaussian_denoiser, start(plan), plan, noise_of)
    assert end.isfinite().all() and end.abs().max() < 100


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_perfect_denoiser_is_followed_to_its_picture(name):
    plan = make_plan(SCHEDULE, name, "leading", 20)
    picture = noise_of(1234)
    end = SAMPLERS[name](lambda x, sigma, step: picture, start(plan), plan, noise_of)
    # What is left is the noise of the last level, which only DDIM does not end without.
    torch.testing.assert_close(end, picture, rtol=0, atol=4 * plan.sigmas[-1] + 1e-12)


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 20), ("heun", 39), ("dpmpp_2m", 20)])
def test_evaluations_carry_their_step(name, evaluations):
    plan = make_plan(SCHEDULE, name, "linspace", 20)
    calls = []

    def denoiser(x, sigma, step):
        calls.append((sigma, step))
        return gaussian_denoiser(x, sigma, step)

    SAMPLERS[name](denoiser, start(plan), plan, noise_of)
    assert len(calls) == evaluations
    assert sorted({step.index for _, step in calls}) == [*range(20)]
    for sigma, step in calls:  # Heun looks ahead within a step
        assert sigma in (step.sigma, step.sigma_next)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_keeps_its_digits_at_the_noise_of_zero_snr(name):
    schedule = Schedule(ScheduleConfig(rescale_betas_zero_snr=True))
    plan = make_plan(schedule, name, "trailing", 4)
    assert plan.sigmas[0] > 4000

    def end(dtype):
        x = start(plan).to(dtype)
        return SAMPLERS[name](gaussian_denoiser, x, plan, lambda i: noise_of(i).to(dtype))

    exact, got = end(torch.float64), end(torch.float32)
    assert (got - exact).abs().max() < 1e-6 * exact.std()


@pytest.mark.parametrize("name", SAMPLERS)
def test_arguments_are_left_alone(name):
    plan = make_plan(SCHEDULE, name, "linspace", 3)
    x = start(plan)
    before = x.clone()
    SAMPLERS[name](gaussian_denoiser, x, plan, noise_of)
    assert torch.equal(x, before)
