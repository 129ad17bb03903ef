"""Feature wrapping is trained, saved and used; the model around it stays as it is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ipx2p.data.loader import Framing, SampleStream, StepSampler
from ipx2p.data.workers import micro_batches
from ipx2p.distributed import World
from ipx2p.editing.decoding import decode
from ipx2p.editing.editor import Editor
from ipx2p.errors import InputError
from ipx2p.fidelity import parse_fidelity
from ipx2p.images import pixels01_from_pixels
from ipx2p.models.vae import VAE
from ipx2p.models.wrapping import FOLDER, FeatureWrapping, WrappingConfig
from ipx2p.seeds import unit_noise
from ipx2p.training.config import TrainConfig
from ipx2p.training.learners import WrappingLearner, pixel_loss
from ipx2p.training.loop import train
from ipx2p.training.run import Run
from ipx2p.training.samples import open_pairs
from ipx2p.training.validation import fixed_pairs, score_table
from ipx2p.weights.convert import convert
from tests.compare_wrapping import by_weight, held_out, of_edit, of_target
from tests.conftest import GOLDEN, ROOT
from tests.training.conftest import QUICK_WRAPPING

WEIGHTS = GOLDEN / "diffusers"


@pytest.fixture
def wrapped(tmp_path) -> Path:
    """The golden weights with a wrapping that is far from neutral."""
    folder = shutil.copytree(WEIGHTS, tmp_path / "wrapped")
    torch.manual_seed(0)
    wrapping = FeatureWrapping(WrappingConfig.of(VAE.load(folder / "vae")))
    for block in wrapping.blocks:
        torch.nn.init.normal_(block.conv_out.weight, 0, 0.05)
    wrapping.save(folder / FOLDER)
    return folder


def wrapping_learner(config) -> WrappingLearner:
    _, held_out = open_pairs(config.data)
    fixed = fixed_pairs(held_out, per_task=1, resolution=config.data.resolution, seed=0)
    return WrappingLearner(config, torch.device("cpu"), fixed, World())


# Training


@torch.no_grad()
def test_the_decoder_gets_latents_of_the_target_and_features_of_the_source(make_config):
    learner = wrapping_learner(make_config(*QUICK_WRAPPING))
    trained, _ = open_pairs(make_config().data)
    stream = SampleStream(trained, Framing(32), seed=0)
    [batch] = micro_batches(stream, StepSampler(range(1), 4), workers=0)
    noise = torch.stack([unit_noise((4, 4, 4), 0, "objective", i) for i in batch.indices])
    vae = learner.vae
    expected = vae.scale(vae.encode(batch.target_pixels).sample(noise=noise))

    def wrapping(vae, latents, features):
        assert torch.equal(latents, expected)
        of_source = vae.features(batch.source_pixels)
        assert all(torch.equal(x, y) for x, y in zip(features, of_source, strict=True))
        return vae.decode(latents)

    plain = learner.losses(batch).weighted  # before any training
    learner.network = wrapping
    assert torch.equal(learner.losses(batch).weighted, plain)
    torch.testing.assert_close(plain, pixel_loss(vae.decode(expected), batch.target_pixels))


def test_a_run_leaves_the_edit_model_as_it_was_and_adds_the_wrapping(make_config, run_folder):
    train(make_config(*QUICK_WRAPPING, "train.ema_decay=0"))
    files = [path.relative_to(WEIGHTS) for path in WEIGHTS.rglob("*.safetensors")]
    for path in files:
        before, after = load_file(WEIGHTS / path), load_file(run_folder / "weights" / path)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    editor = Editor.load(run_folder / "weights", device="cpu")
    assert editor.settings.fidelity == "wrap"
    [score, *_] = Run(make_config(*QUICK_WRAPPING, "train.ema_decay=0")).final_scores()
    assert score["psnr_edit"] != score["psnr_edit_plain"] and "psnr_edit_unguided" in score
    assert "plain dB" in score_table([score])
    assert editor.wrapping.blocks[0].conv_out.weight.abs().max() > 0


def test_training_goes_on_from_the_wrapping_of_the_weights(make_config, wrapped):
    learner = wrapping_learner(make_config(*QUICK_WRAPPING, f"model.weights={wrapped}"))
    start = FeatureWrapping.load(wrapped / FOLDER)
    for name, tensor in learner.module.state_dict().items():
        assert torch.equal(tensor, start.state_dict()[name])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.min_snr_gamma=5", r"objective\.min_snr_gamma is for objective\.kind edit"),
        (
            "objective.prediction_type=sample",
            "objective.prediction_type is for objective.kind edit",
        ),
        ("data.draws=1 data.cache=true", "data.cache holds the output of an autoencoder"),
        (
            "validation.edit.fidelity=none",
            "fidelity is 'none': objective.kind wrapping needs a sta",
        ),
        ("objective.kind=edit", "fidelity is 'wrap': objective.kind wrapping needs a stack"),
        ("model.vae={}", r"model\.vae: feature wrapping is trained with the networks of"),
    ],
)
def test_what_means_nothing_to_a_wrapping_is_refused(make_config, override, message):
    with pytest.raises(InputError, match=message):
        make_config(*QUICK_WRAPPING, *override.split())


def test_a_text_to_image_model_is_refused(make_config, tmp_path):
    folder = shutil.copytree(WEIGHTS, tmp_path / "four")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 4}))
    with pytest.raises(InputError, match="needs an edit model, of 8 input channels, found 4"):
        wrapping_learner(make_config(*QUICK_WRAPPING, f"model.weights={folder}"))


# Use


@torch.no_grad()
def test_at_weight_0_it_is_bitwise_the_plain_decoder(wrapped, coffee, editor):
    own = Editor.load(wrapped, device="cpu")
    latents = editor.edit(coffee, "denoise the image", num_steps=1).latents[0][None]
    plain = editor.vae.decode(latents)[0]
    assert torch.equal(decode(own.vae, latents, coffee, own.wrapping, 0.0), plain)
    assert torch.equal(decode(editor.vae, latents, coffee), plain)
    half, whole = (decode(own.vae, latents, coffee, own.wrapping, w) - plain for w in (0.5, 1.0))
    assert 1e-3 < half.abs().mean() < whole.abs().mean()


def test_in_tiles_it_is_the_same(wrapped, coffee, monkeypatch):
    own = Editor.load(wrapped, device="cpu")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = decode(own.vae, latents, coffee, own.wrapping, 1.0)
    monkeypatch.setattr(VAE, "tile_for", lambda *_: 16)
    tiled = decode(own.vae, latents, coffee, own.wrapping, 1.0)
    torch.testing.assert_close(tiled, whole, atol=1e-4, rtol=0)


def test_an_edit_is_decoded_with_the_weight_of_its_stack(wrapped, coffee, editor):
    own = Editor.load(wrapped, device="cpu")
    ask = ("denoise the image",)
    plain = editor.edit(coffee, *ask, num_steps=1)
    for stack, weight in (("none", 0.0), ("wrap:weight=0", 0.0), ("wrap:weight=0.5", 0.5)):
        edit = own.edit(coffee, *ask, num_steps=1, fidelity=stack)
        assert torch.equal(edit.latents[0], plain.latents[0])
        pixels = decode(own.vae, plain.latents[0][None], coffee, own.wrapping, weight)
        assert torch.equal(edit.pixels01[0], pixels01_from_pixels(pixels))
        assert torch.equal(edit.pixels01[0], plain.pixels01[0]) == (weight == 0)


def test_a_stack_with_wrap_is_the_same_in_any_order():
    one, other = (parse_fidelity(text) for text in ("wavelet+wrap+start", "start+wrap+wavelet"))
    assert one == other and [knob.name for knob in one] == ["start", "wrap", "wavelet"]


def test_a_weight_without_a_wrapping_is_refused(editor, coffee):
    with pytest.raises(InputError, match="have no wrapping/, which fidelity wrap needs"):
        editor.edit(coffee, "denoise the image", fidelity="wrap")
    with pytest.raises(InputError, match="have no wrapping/, .*objective.kind=wrapping"):
        decode(editor.vae, torch.zeros(1, 4, 8, 8), coffee, editor.wrapping, 0.5)


# Weights folders


def test_conversion_keeps_it_in_every_dtype(wrapped, tmp_path):
    for number, dtype in enumerate([None, "float16", "bfloat16"]):
        convert(str(wrapped), tmp_path / str(number), dtype=dtype)
        assert Editor.load(tmp_path / str(number), device="cpu").wrapping is not None
    before, after = (
        load_file(folder / FOLDER / "diffusion_pytorch_model.safetensors")
        for folder in (wrapped, tmp_path / "0")
    )
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_another_autoencoder_and_a_single_file_have_none(wrapped, tmp_path, capsys):
    (wrapped / "edit_settings.json").write_text('{"fidelity": "wrap", "num_steps": 1}')
    convert(str(wrapped), tmp_path / "out", vae=str(GOLDEN / "diffusers_v2" / "vae"))
    assert Editor.load(tmp_path / "out", device="cpu").settings.fidelity == "none"
    assert not (tmp_path / "out" / FOLDER).exists()
    assert "its feature wrapping is left out" in capsys.readouterr().out
    convert(str(wrapped), tmp_path / "one.safetensors", to="ldm")
    assert "its feature wrapping is left out" in capsys.readouterr().out


@pytest.mark.slow
def test_after_a_short_training_psnr_rises_with_the_weight(tmp_path, monkeypatch):
    """On held-out photographs, for latents of the target and for edits."""
    monkeypatch.chdir(ROOT)
    config = TrainConfig.load("configs/tiny_cfw.yaml", [f"run.dir={tmp_path}", "train.device=cpu"])
    train(config)
    editor = Editor.load(tmp_path / "tiny_cfw" / "weights", device="cpu")
    for latents_of in (of_target, of_edit):
        by_task = by_weight(editor, held_out(config), latents_of)
        means = torch.tensor([*by_task.values()]).mean(0).tolist()
        assert means == sorted(means) and means[-1] > means[0] + 0.1
