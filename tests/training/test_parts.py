"""The average, checkpoints of the optimizer, learners, and the over-fit that shows they learn."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from ipx2p.data.loader import Framing, SampleStream, StepSampler
from ipx2p.data.workers import micro_batches
from ipx2p.diffusion.objective import draw
from ipx2p.distributed import World
from ipx2p.errors import InputError
from ipx2p.metrics import METRICS, Metric, l1
from ipx2p.models.vae import VAE
from ipx2p.tensor_files.tensors import save_tensors
from ipx2p.training.checkpoint import MOMENTS, load_optimizer, optimizer_tensors
from ipx2p.training.ema import EMA
from ipx2p.training.learners import LEARNERS, EditLearner
from ipx2p.training.loop import train
from ipx2p.training.run import Run
from ipx2p.training.samples import open_pairs
from ipx2p.training.validation import fixed_pairs, score_table, validate_autoencoder
from tests.conftest import GOLDEN
from tests.training.conftest import QUICK_VAE


def edit_learner(config) -> EditLearner:
    """The learner of a run, with its held-out pairs."""
    _, held_out = open_pairs(config.data)
    fixed = fixed_pairs(held_out, per_task=1, resolution=config.data.resolution, seed=0)
    return EditLearner(config, torch.device("cpu"), fixed, World())


def test_average_follows_with_a_decay_that_warms_up():
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    average = EMA(module, decay=0.5)
    expected = 0.0
    for update in range(1, 12):
        nn.init.constant_(module.weight, float(update))
        average.update(module, update)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * update
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)
    before = average.module.weight.clone()
    average.update(nn.Linear(1, 1, bias=False), 12, torch.ones(()))  # a bad update
    assert torch.equal(average.module.weight, before)


def test_average_is_a_frozen_copy_of_float32_weights():
    module = nn.Linear(2, 2)
    average = EMA(module, decay=0.9)
    assert not any(p.requires_grad for p in average.module.parameters())
    assert all(p.requires_grad for p in module.parameters())
    with pytest.raises(AssertionError, match="master weights"):
        EMA(nn.Linear(2, 2).bfloat16(), decay=0.9)


def test_optimizer_state_survives_as_named_tensors(generator, tmp_path):
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizer = AdamW(module.parameters(), lr=0.1)
    inputs = torch.randn(4, 3, generator=generator)

    def step(module, optimizer):
        optimizer.zero_grad()
        module(inputs).square().sum().backward()
        optimizer.step()

    step(module, optimizer)
    copied = copy.deepcopy(module)
    restored = AdamW(copied.parameters(), lr=0.1)
    tensors = optimizer_tensors(module, optimizer)
    assert "0.weight.exp_avg" in tensors and "1.bias.step" in tensors
    save_tensors(tensors, tmp_path / "here")
    load_optimizer(copied, restored, tmp_path / "here")
    step(module, optimizer)
    step(copied, restored)
    for one, other in zip(module.parameters(), copied.parameters(), strict=True):
        assert torch.equal(one, other)


def test_restored_moments_have_the_memory_layout_of_their_weights(tmp_path):
    module = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    optimizer = AdamW(module.parameters(), lr=0.1)
    tensors = {}
    for name, parameter in module.named_parameters():
        tensors |= {f"{name}.{key}": torch.randn(parameter.shape) for key in MOMENTS[1:]}
        tensors[f"{name}.step"] = torch.tensor(3.0)
    save_tensors(tensors, tmp_path / "here")
    load_optimizer(module, optimizer, tmp_path / "here")
    state = optimizer.state[module.weight]
    assert state["exp_avg"].stride() == module.weight.stride() != tensors["weight.exp_avg"].stride()
    assert torch.equal(state["exp_avg"], tensors["weight.exp_avg"])
    del tensors["bias.exp_avg"]
    save_tensors(tensors, tmp_path / "here")
    with pytest.raises(InputError, match=r"here does not fit the model: 1 missing \(bias.exp_avg"):
        load_optimizer(module, optimizer, tmp_path / "here")


def test_validation_pairs_are_fixed_and_cover_the_tasks(make_config):
    _, held_out = open_pairs(make_config().data)
    one, other = (fixed_pairs(held_out, per_task=2, resolution=32, seed=0) for _ in range(2))
    assert [pair.task for pair in one] == ["denoise"] * 2 + ["enhance"] * 2
    assert all(
        torch.equal(a.source_pixels01, b.source_pixels01) for a, b in zip(one, other, strict=True)
    )
    few = fixed_pairs(held_out, per_task=1, resolution=32, seed=0)
    assert torch.equal(few[0].source_pixels01, one[0].source_pixels01) and len(few) == 2


def test_held_out_photographs_are_never_trained_on(make_config):
    trained, held_out = open_pairs(make_config().data)
    names, others = (
        {path.name for item in range(len(pairs)) for path in pairs.files(item)}
        for pairs in (trained, held_out)
    )
    assert len(names) == 19 and not names & {"castle.jpg", "coffee.jpg"}
    assert others == {"castle.jpg", "coffee.jpg"}


def test_equal_seeds_give_equal_fresh_weights(make_config):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))  # whatever was drawn before
        learner = edit_learner(make_config(f"run.seed={seed}"))
        states.append(learner.module.conv_in.weight.detach().clone())
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_table_shows_every_score():
    table = score_table(
        [
            {"task": "enhance", "pairs": 4, "psnr_input": 9.123, "psnr_edit": 15.456,
             "psnr_ceiling": 25.789, "ssim_edit": 0.9},
            {"task": "x", "pairs": 1, "psnr_ceiling": 20},
            {"task": "turn it into an old photograph", "pairs": 2, "psnr_ceiling": 20},
        ]
    )  # fmt: skip
    assert len({len(line) for line in table.splitlines()}) == 1  # columns stand below one another
    assert [*table.splitlines()[1].split()] == ["enhance", "4", "9.12", "15.46", "25.79"]
    assert [*table.splitlines()[2].split()] == ["x", "1", "-", "-", "20.00"]


def test_table_names_what_guidance_costs_and_tasks_that_got_worse():
    score = {"task": "denoise", "pairs": 2, "psnr_ceiling": 27.0, "psnr_input": 20.6}
    table = score_table([score | {"psnr_edit": 19.3, "psnr_edit_unguided": 20.3}])
    assert table.splitlines()[0].split()[2:6] == ["input", "dB", "unguided", "dB"]
    assert table.splitlines()[1].split()[2:] == ["20.60", "20.30", "19.30", "27.00"]
    assert (
        table.splitlines()[2] == "denoise: edits are further from their targets than the input is"
    )
    assert len(score_table([score | {"psnr_edit": 21.0}]).splitlines()) == 2


def test_a_metric_is_one_entry(make_config, monkeypatch):
    monkeypatch.setitem(METRICS, "l1", Metric(l1, "", 4, higher_is_better=False))
    _, held_out = open_pairs(make_config().data)
    fixed = fixed_pairs(held_out, per_task=1, resolution=32, seed=0)
    vae = VAE.load(GOLDEN / "diffusers" / "vae")
    report = validate_autoencoder(vae, fixed, World())
    assert 0 < report.scalars()["l1_ceiling/round trip"] < 1
    assert report.quality() == report.scores[0]["psnr_ceiling"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_edit_objective_shows_the_network_what_the_paper_says(make_config, prediction_type):
    learner = edit_learner(make_config(f"objective.prediction_type={prediction_type}"))
    trained, _ = open_pairs(make_config().data)
    stream = SampleStream(trained, Framing(32), seed=0)
    [batch] = micro_batches(stream, StepSampler(range(1), 60), workers=0)
    draws = draw(0, batch.indices, (4, 4, 4), 1000)
    vae, text = learner.frozen.get()
    with torch.no_grad():
        target = vae.encode(batch.target_pixels)
        source = vae.encode(batch.source_pixels).mean  # modal, unscaled
        states = text.encode(batch.instructions)
    latents = vae.config.scaling_factor * target.sample(noise=draws.posterior_noise)
    seen = {}

    def network(noisy, timesteps, text, source_latents):
        seen.update(noisy=noisy, timesteps=timesteps, text=text, source=source_latents)
        return learner.schedule.target(latents, draws.noise, draws.timesteps)

    learner.network = network
    losses = learner.losses(batch)
    torch.testing.assert_close(losses.weighted, torch.zeros(60), atol=1e-10, rtol=0)
    assert torch.equal(losses.quartiles, draws.timesteps // 250)
    assert torch.equal(seen["timesteps"], draws.timesteps.float())
    noisy = learner.schedule.add_noise(latents, draws.noise, draws.timesteps)
    torch.testing.assert_close(seen["noisy"], noisy)
    no_text = draws.dropout < 0.1
    no_source = (draws.dropout >= 0.05) & (draws.dropout < 0.15)
    assert 0 < no_text.sum() < 20 and 0 < no_source.sum() < 20
    torch.testing.assert_close(seen["source"][~no_source], source[~no_source])
    assert seen["source"][no_source].count_nonzero() == 0
    torch.testing.assert_close(seen["text"][~no_text], states[~no_text])
    counts = {"text": (no_text & ~no_source), "image": (no_source & ~no_text)}
    assert {name: int(hidden.sum()) for name, hidden in counts.items()} | {
        "both": int((no_text & no_source).sum())
    } == losses.hidden
    null_text = text.encode([""])[0]
    torch.testing.assert_close(seen["text"][no_text], null_text.expand(int(no_text.sum()), -1, -1))


@pytest.mark.parametrize("kind", ["edit", "autoencoder"])
def test_another_autoencoder_takes_the_place_of_that_of_the_weights(make_config, kind):
    other = GOLDEN / "diffusers_v2" / "vae"
    config = make_config(f"objective.kind={kind}", f"model.vae_weights={other}")
    _, held_out = open_pairs(config.data)
    fixed = fixed_pairs(held_out, per_task=1, resolution=32, seed=0)
    learner = LEARNERS[kind](config, torch.device("cpu"), fixed, World())
    saved, expected = learner.weights(learner.module, whole=True).vae, VAE.load(other)
    assert saved.config == expected.config
    for name, tensor in expected.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor)


def test_zero_snr_is_not_trained_with_epsilon(make_config):
    config = make_config(f"model.weights={GOLDEN / 'diffusers_v2'}", "model.unet=null")
    assert edit_learner(config).schedule.config.prediction_type == "v_prediction"
    config.objective.prediction_type = "epsilon"
    with pytest.raises(InputError, match=r"zero-terminal SNR.*set objective\.prediction_type"):
        edit_learner(config)


@pytest.mark.slow
def test_autoencoder_learns(make_config):
    config = make_config(*QUICK_VAE, "train.steps=300", "train.batch_size=8",
                         "train.checkpoint_every=300", "train.log_every=100",
                         "optimizer.learning_rate=3e-3", "train.ema_decay=0.99")  # fmt: skip
    train(config)
    [score] = Run(config).final_scores()
    assert score["psnr_ceiling"] > 16  # untrained: below 10
