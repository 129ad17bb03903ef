"""The training schedule and sampling plans, against the reference and against themselves."""

import json
import math

import pytest
import torch

from ipx2p.diffusion.samplers import make_plan
from ipx2p.diffusion.schedule import Schedule, ScheduleConfig
from ipx2p.errors import InputError
from ipx2p.names import SAMPLERS, SPACINGS
from tests.conftest import GOLDEN

GOLDEN_PLANS = [
    ("ddim", "leading"),
    ("ddpm", "leading"),
    ("dpmpp_2m", "linspace"),
    ("dpmpp_2m", "trailing"),
    ("euler", "karras"),
    ("euler", "leading"),
    ("euler", "linspace"),
    ("euler", "trailing"),
    ("euler_ancestral", "leading"),
    ("euler_ancestral", "linspace"),
]


@pytest.fixture(scope="module")
def schedule():
    return Schedule()


@pytest.fixture(scope="module")
def zero_snr():
    path = GOLDEN / "diffusers_v2" / "scheduler" / "scheduler_config.json"
    return Schedule(ScheduleConfig.read(path))


def test_alphas_match_the_reference(schedule, golden):
    expected = golden["schedule.alphas_cumprod"].double()
    torch.testing.assert_close(schedule.alphas_cumprod, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("sampler", "spacing"), GOLDEN_PLANS)
def test_plan_visits_the_noise_levels_of_the_reference(schedule, golden, sampler, spacing):
    plan = make_plan(schedule, sampler, spacing, 20)
    name = f"edit.{sampler}.{spacing}"
    # Karras timesteps come from sigmas in float32 there, hence the tolerance.
    timesteps = torch.tensor(plan.timesteps)
    torch.testing.assert_close(timesteps, golden[f"{name}.timesteps"], atol=2e-3, rtol=0)
    if f"{name}.sigmas" in golden:
        sigmas = torch.tensor(plan.sigmas)
        torch.testing.assert_close(sigmas, golden[f"{name}.sigmas"], atol=0, rtol=3e-5)


def test_zero_snr_plan_matches_the_reference(zero_snr, golden):
    plan = make_plan(zero_snr, "euler", "trailing", 20)
    expected = golden["edit_v2.euler.trailing.sigmas"]
    torch.testing.assert_close(torch.tensor(plan.sigmas), expected, atol=0, rtol=3e-6)
    assert plan.sigmas[0] == pytest.approx(4096, rel=1e-6)
    assert plan.start_factor == plan.sigmas[0]


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "karras"])
@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "heun"])
def test_euler_family_starts_at_sigma(schedule, sampler, spacing):
    plan = make_plan(schedule, sampler, spacing, 20)
    assert plan.start_factor == plan.sigmas[0] == pytest.approx(14.6146, abs=1e-4)


@pytest.mark.parametrize(
    ("sampler", "spacing"),
    [("euler", "leading"), ("ddpm", "trailing"), ("ddim", "linspace"), ("dpmpp_2m", "karras")],
)
def test_others_start_at_the_full_variance(schedule, sampler, spacing):
    plan = make_plan(schedule, sampler, spacing, 20)
    assert plan.start_factor == pytest.approx(math.sqrt(1 + plan.sigmas[0] ** 2), rel=1e-12)


def test_only_ddim_ends_at_the_first_training_sigma(schedule):
    for sampler in SAMPLERS:
        plan = make_plan(schedule, sampler, "leading", 20)
        if sampler == "ddim":
            assert plan.sigmas[-1] == pytest.approx(0.02917, abs=1e-5)
            assert plan.end_factor == pytest.approx((1 + plan.sigmas[-1] ** 2) ** -0.5, rel=1e-12)
        else:
            assert plan.sigmas[-1] == 0 and plan.end_factor == 1


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_starts_at_the_last_timestep(schedule, sampler, spacing):
    assert make_plan(schedule, sampler, spacing, 1).timesteps == (999.0,)


@pytest.mark.parametrize("num_steps", [2, 3, 7, 50, 333, 600, 999, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_plans_fall_and_stay_in_range(schedule, sampler, spacing, num_steps):
    plan = make_plan(schedule, sampler, spacing, num_steps)
    assert len(plan) == len([*plan]) == num_steps
    assert all(0 <= t <= 999 for t in plan.timesteps)
    pairs = [*zip(plan.sigmas, plan.sigmas[1:], strict=False)]
    assert all(before >= after for before, after in pairs)
    assert sum(before == after for before, after in pairs) <= 3  # where 1000 points are too many


@pytest.mark.parametrize("num_steps", [0, -3, 1001, 5000])
def test_impossible_numbers_of_steps_are_refused(schedule, num_steps):
    with pytest.raises(InputError, match=f"{num_steps} steps asked for, expected 1 to 1000"):
        make_plan(schedule, "euler", "linspace", num_steps)


def test_unknown_spacing_is_refused_with_the_known_ones(schedule):
    with pytest.raises(InputError, match=r"did you mean linspace\?.*leading, trailing, karras"):
        make_plan(schedule, "euler", "linspaced", 20)


@pytest.mark.parametrize("timestep", [0.0, 0.25, 1.0, 52.57, 500.5, 946.4210526, 998.999, 999.0])
def test_timestep_is_the_inverse_of_sigma(schedule, zero_snr, timestep):
    for each in (schedule, zero_snr):
        assert each.timestep(each.sigma(timestep)) == pytest.approx(timestep, abs=1e-8)


def test_whole_timesteps_have_the_training_sigmas(schedule, golden):
    alphas = golden["schedule.alphas_cumprod"].double()
    for timestep in (0, 1, 500, 999):
        expected = ((1 - alphas[timestep]) / alphas[timestep]).sqrt().item()
        assert schedule.sigma(timestep) == pytest.approx(expected, rel=2e-5)


def test_timesteps_outside_the_training_range_are_clamped(schedule):
    assert schedule.timestep(1e6) == 999 and schedule.timestep(1e-6) == 0


def test_noise_and_velocity_match_the_reference(schedule, golden):
    x0, eps, timesteps = golden["noise.x0"], golden["noise.eps"], golden["noise.t"]
    noisy = schedule.add_noise(x0, eps, timesteps)
    torch.testing.assert_close(noisy, golden["noise.x_t"], atol=1e-5, rtol=0)
    v = Schedule(ScheduleConfig(prediction_type="v_prediction")).target(x0, eps, timesteps)
    torch.testing.assert_close(v, golden["noise.v"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_perfect_prediction_gives_back_the_picture(prediction_type, rescale, generator):
    config = ScheduleConfig(prediction_type=prediction_type, rescale_betas_zero_snr=rescale)
    schedule = Schedule(config)
    x0, noise = torch.randn(2, 3, 4, 2, 2, generator=generator)
    for timestep in (0, 400, 998):
        timesteps = torch.full((3,), timestep)
        sigma = schedule.sigma(timestep)
        # At unit variance x_t = alpha (x0 + sigma n): the same point in both units.
        x_t, x = schedule.add_noise(x0, noise, timesteps), x0 + sigma * noise
        torch.testing.assert_close(x_t * math.sqrt(1 + sigma**2), x, atol=1e-4, rtol=1e-4)
        denoised = schedule.denoised(schedule.target(x0, noise, timesteps), x, sigma)
        torch.testing.assert_close(denoised, x0, atol=2e-4, rtol=1e-3)


def test_zero_snr_keeps_the_first_alpha_and_floors_the_last(schedule, zero_snr):
    assert zero_snr.alphas_cumprod[0] == pytest.approx(schedule.alphas_cumprod[0].item(), rel=1e-12)
    assert zero_snr.alphas_cumprod[-1] == 2.0**-24
    assert (zero_snr.alphas_cumprod.diff() < 0).all()


@pytest.mark.parametrize("folder", ["diffusers", "diffusers_v2"])
def test_config_survives_writing_and_reading(tmp_path, folder):
    published = GOLDEN / folder / "scheduler" / "scheduler_config.json"
    config = ScheduleConfig.read(published)
    config.write(tmp_path / "scheduler_config.json")
    assert ScheduleConfig.read(tmp_path / "scheduler_config.json") == config
    raw = json.loads(published.read_text())
    assert config.prediction_type == raw["prediction_type"]
    assert config.rescale_betas_zero_snr == raw["rescale_betas_zero_snr"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prediction_type", "flow"),
        ("beta_schedule", "squaredcos_cap_v2"),
        ("trained_betas", [0.1, 0.2]),
        ("beta_start", -1.0),
        ("num_train_timesteps", 1),
        ("use_flow_sigmas", True),
    ],
)
def test_config_that_cannot_be_honoured_is_refused_by_field(tmp_path, field, value):
    raw = json.loads((GOLDEN / "diffusers/scheduler/scheduler_config.json").read_text())
    (tmp_path / "scheduler_config.json").write_text(json.dumps(raw | {field: value}))
    with pytest.raises(InputError, match=rf"scheduler_config\.json: {field}\b"):
        ScheduleConfig.read(tmp_path / "scheduler_config.json")


@pytest.mark.parametrize("betas", [(1e-20, 1e-20), (1e-17, 0.012), (0.5, 0.9), (0.9, 0.999999)])
def test_betas_without_usable_noise_levels_are_refused(betas):
    config = ScheduleConfig(beta_schedule="linear", beta_start=betas[0], beta_end=betas[1])
    with pytest.raises(InputError, match=r"beta_start .* give noise levels that are not finite"):
        Schedule(config)
