"""The training objective: draws per sample, conditioning dropout, loss."""

import pytest
import torch

from ipx2p.diffusion.objective import (
    DropoutConfig,
    draw,
    drop_conditions,
    hidden_conditions,
    loss_per_sample,
    min_snr_weight,
)
from ipx2p.diffusion.schedule import Schedule, ScheduleConfig
from ipx2p.errors import InputError

SHAPE = (4, 3, 5)


def test_draws_belong_to_samples_not_to_batches():
    together = draw(0, [5, 6, 7], SHAPE, 1000)
    alone = draw(0, [6], SHAPE, 1000)
    for name, value in vars(alone).items():
        assert torch.equal(value[0], getattr(together, name)[1])


def test_draws_differ_between_samples_and_seeds():
    a, b = draw(0, [1, 2], SHAPE, 1000), draw(1, [1, 2], SHAPE, 1000)
    assert not torch.equal(a.noise[0], a.noise[1])
    assert not torch.equal(a.noise, b.noise)
    assert not torch.equal(a.noise, a.posterior_noise)


def test_draws_cover_their_ranges():
    draws = draw(0, range(4000), (4, 1, 1), 1000)
    assert draws.timesteps.min() == 0 and draws.timesteps.max() == 999
    assert draws.timesteps.float().mean().item() == pytest.approx(499.5, rel=0.03)
    assert draws.noise.std().item() == pytest.approx(1, rel=0.03)
    assert draws.dropout.min() >= 0 and draws.dropout.max() < 1
    assert draws.dropout.mean().item() == pytest.approx(0.5, rel=0.03)


def dropped(uniform, dropout):
    """Which samples lose (text, source)."""
    count = len(uniform)
    text, source = torch.ones(count, 77, 6), torch.ones(count, *SHAPE)
    null_text = torch.full((1, 77, 6), -1.0)
    hidden = hidden_conditions(uniform, dropout)
    text, source = drop_conditions(text, source, null_text, *hidden)
    assert (text.flatten(1).std(1) == 0).all() and (source.flatten(1).std(1) == 0).all()
    return text[:, 0, 0] == -1, source[:, 0, 0, 0] == 0


def test_shifted_timesteps_follow_their_formula():
    # SD3 (arXiv:2403.03206, eq. 23): below t lies the share t / (s - (s - 1) t) of them.
    timesteps = draw(0, range(4000), (4, 1, 1), 1000, timestep_shift=3.0).timesteps
    assert timesteps.min() >= 0 and timesteps.max() == 999
    for t in (0.25, 0.5, 0.75, 0.9):
        expected = t / (3 - 2 * t)
        assert (timesteps < 1000 * t).float().mean().item() == pytest.approx(expected, abs=0.03)


def test_default_dropout_is_5_5_5_with_one_draw_per_sample():
    no_text, no_source = dropped(torch.linspace(0, 1, 2001)[:-1], DropoutConfig())
    assert (no_text & ~no_source).sum() == 100
    assert (no_text & no_source).sum() == 100
    assert (~no_text & no_source).sum() == 100


def test_dropout_shares_are_independent():
    uniform = torch.linspace(0, 1, 1001)[:-1]
    no_text, no_source = dropped(uniform, DropoutConfig(text=0.1, image=0.2, both=0.3))
    kinds = (no_text & ~no_source, ~no_text & no_source, no_text & no_source)
    assert [kind.float().mean().item() for kind in kinds] == pytest.approx(
        [0.1, 0.2, 0.3], abs=2e-3
    )


def test_no_dropout_hides_nothing(generator):
    no_text, no_source = dropped(torch.rand(100, generator=generator), DropoutConfig(0, 0, 0))
    assert not no_text.any() and not no_source.any()


@pytest.mark.parametrize("shares", [(-0.1, 0, 0), (0.5, 0.5, 0.1)])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(InputError, match="shares .* must be 0 or more"):
        DropoutConfig(*shares).check("objective.dropout")


def test_loss_is_the_mean_square_of_each_sample(generator):
    prediction, target = torch.randn(2, 3, *SHAPE, generator=generator)
    loss = loss_per_sample(prediction.bfloat16(), target)
    expected = [
        ((p.bfloat16().float() - t) ** 2).mean() for p, t in zip(prediction, target, strict=True)
    ]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.stack(expected))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_caps_the_weight_of_x0_at_gamma(prediction_type, generator):
    """Errors of one size in x0, as each kind of network makes them, weigh min(SNR, gamma)."""
    schedule = Schedule(ScheduleConfig(prediction_type=prediction_type))
    timesteps = torch.arange(0, 1000, 37)
    latents, noise, error = torch.randn(3, len(timesteps), *SHAPE, generator=generator)
    snr = schedule.snr(timesteps)
    alpha = (snr / (1 + snr)).sqrt().view(-1, 1, 1, 1)
    noisy = schedule.add_noise(latents, noise, timesteps)
    wrong = latents + 0.01 * error  # with the noise that explains the same noisy latents
    wrong_noise = (noisy - alpha * wrong) / (1 - alpha**2).sqrt()
    loss = loss_per_sample(
        schedule.target(wrong, wrong_noise, timesteps), schedule.target(latents, noise, timesteps)
    )
    weighted = loss * min_snr_weight(snr, 5.0, prediction_type)
    expected = (0.01 * error).square().flatten(1).mean(1) * snr.clamp(max=5.0)
    torch.testing.assert_close(weighted, expected, rtol=0.02, atol=1e-7)
