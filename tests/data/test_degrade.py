"""Degradations on [0, 1] pixels."""

import pytest
import torch

from ipx2p.data.degrade import (
    DEGRADATIONS,
    DegradeConfig,
    LowLightConfig,
    NoiseConfig,
    check_task,
    degrade,
    linear_from_srgb,
    low_light,
    sensor_noise,
    srgb_from_linear,
)
from ipx2p.data.instructions import INSTRUCTIONS
from ipx2p.errors import InputError

GREY = torch.full((3, 64, 64), 0.5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_linear_light_and_back_is_the_identity():
    values = torch.linspace(0, 1, 1001)
    torch.testing.assert_close(srgb_from_linear(linear_from_srgb(values)), values)


def test_linear_light_has_the_values_of_the_standard():
    values = torch.tensor([0.0, 0.04045, 0.5, 1.0])
    expected = torch.tensor([0.0, 0.0031308, 0.2140411, 1.0])
    torch.testing.assert_close(linear_from_srgb(values), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("task", DEGRADATIONS)
def test_result_is_a_picture_and_the_argument_is_left_alone(task):
    picture = torch.rand(3, 20, 30, generator=seeded(1))
    before = picture.clone()
    result = degrade(picture, task, seeded(), DegradeConfig())
    assert result.shape == picture.shape and result.dtype == torch.float32
    assert result.min() >= 0 and result.max() <= 1 and result.isfinite().all()
    assert torch.equal(picture, before)


@pytest.mark.parametrize("task", DEGRADATIONS)
def test_the_generator_decides_everything(task):
    one, same = (degrade(GREY, task, seeded(3), DegradeConfig()) for _ in range(2))
    other = degrade(GREY, task, seeded(4), DegradeConfig())
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_noise_has_the_variance_of_its_model():
    result = sensor_noise(GREY, seeded(), NoiseConfig(shot=[0.01, 0.01], read=[0.02, 0.02]))
    light = linear_from_srgb(result)
    mean = linear_from_srgb(GREY)[0, 0, 0].item()
    assert light.mean().item() == pytest.approx(mean, rel=0.01)
    assert light.std().item() == pytest.approx((0.01 * mean + 0.02**2) ** 0.5, rel=0.03)


def test_low_light_halves_the_light_per_stop():
    clean = {"shot": [0.0, 0.0], "read": [0.0, 0.0], "cast": 0.0}
    result = low_light(GREY, seeded(), LowLightConfig(stops=[3.0, 3.0], **clean))
    torch.testing.assert_close(linear_from_srgb(result), linear_from_srgb(GREY) / 8)


def test_low_light_casts_a_colour_around_green():
    clean = {"shot": [0.0, 0.0], "read": [0.0, 0.0]}
    config = LowLightConfig(stops=[2.0, 2.0], cast=0.1, **clean)
    gains = torch.stack([
        linear_from_srgb(low_light(GREY, seeded(seed), config))[:, 0, 0] for seed in range(50)
    ]) / (linear_from_srgb(GREY)[0, 0, 0] / 4)  # fmt: skip
    assert (gains[:, 1] - 1).abs().max() < 1e-3
    assert gains[:, 0].std() > 0.03 and gains[:, 2].std() > 0.03
    assert gains.min() > 0.89 and gains.max() < 1.11


def test_severities_come_from_their_range():
    config = NoiseConfig(shot=[0.0, 0.0], read=[0.01, 0.1])
    deviations = [
        linear_from_srgb(sensor_noise(GREY, seeded(seed), config)).std().item()
        for seed in range(40)
    ]
    assert 0.009 < min(deviations) < 0.03 and 0.08 < max(deviations) < 0.11


def test_every_task_has_an_instruction():
    assert DEGRADATIONS.keys() == INSTRUCTIONS.keys()


@pytest.mark.parametrize("bad", [[0.3], [0.2, 0.1], [-1.0, 1.0]])
def test_a_range_that_is_none_is_refused_by_key(bad):
    with pytest.raises(InputError, match=r"data\.degrade\.noise\.shot is .*expected a range"):
        DegradeConfig(noise=NoiseConfig(shot=bad)).check("data.degrade")
    DegradeConfig().check("data.degrade")


def test_unknown_task_is_refused():
    with pytest.raises(
        InputError, match=r"data\.tasks: no degradation for 'denoize'; did you mean"
    ):
        check_task("denoize", "data.tasks")
