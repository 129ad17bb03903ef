"""Knobs of fidelity in whole edits: neutral, stacked, in batches, at full size; the start."""

import json

import pytest
import torch
from PIL import Image

from ipx2p.diffusion.samplers import SAMPLERS, euler
from ipx2p.errors import InputError
from ipx2p.fidelity import KNOBS, parse_fidelity
from ipx2p.images import fit, load_image, pixels01_from_image, pixels_from_pixels01
from ipx2p.photos import read_photo
from tests.conftest import GOLDEN
from tests.editing.test_editor import pictures

QUICK = {"num_steps": 4, "sampler": "euler_ancestral"}
NEUTRAL = {name: f"{name}:{made.neutral[0]}={made.neutral[1]}" for name, made in KNOBS.items()}


def scaled_source(editor, image):
    """Scaled latents of a picture, (4, h, w)."""
    pixels = pixels_from_pixels01(pixels01_from_image(image))[None]
    with torch.no_grad():
        return editor.vae.scale(editor.vae.encode(pixels).mode())[0]


@pytest.mark.parametrize("spec", ["none", *NEUTRAL.values(), "+".join(NEUTRAL.values())])
def test_at_its_neutral_value_an_edit_is_the_plain_one_bit_for_bit(editor, coffee, spec):
    plain = editor.edit(coffee, "x", **QUICK)
    result = editor.edit(coffee, "x", fidelity=spec, **QUICK)
    assert torch.equal(result.latents[0], plain.latents[0])
    assert torch.equal(result.pixels01[0], plain.pixels01[0])
    assert result.evaluations == plain.evaluations


def test_knobs_of_pixels_change_the_decoded_picture_alone(editor, coffee):
    plain = editor.edit(coffee, "x", **QUICK)
    source = pixels01_from_image(coffee)
    for spec in ("transfer", "mask:threshold=0.3", "adain", "wavelet", "mask:threshold=0.2+adain"):
        result = editor.edit(coffee, "x", fidelity=spec, **QUICK)
        assert torch.equal(result.latents[0], plain.latents[0])
        expected = parse_fidelity(spec).apply(source, plain.pixels01[0])
        assert torch.equal(result.pixels01[0], expected)
        assert not torch.equal(expected, plain.pixels01[0])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_edit_with_knobs_does_not_depend_on_its_batch(editor, batch_size):
    how = {"fidelity": "start:strength=0.5+transfer:weight=0.5+mask+adain+wavelet", **QUICK}
    together = editor.edit(pictures(), "x", seeds=[3, 1, 4, 1], batch_size=batch_size, **how)
    for i, (picture, seed) in enumerate(zip(pictures(), [3, 1, 4, 1], strict=True)):
        alone = editor.edit(picture, "x", seeds=seed, **how)
        torch.testing.assert_close(alone.pixels01[0], together.pixels01[i], atol=1e-4, rtol=0)
        assert together.images[i].size == picture.size


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_weaker_start_stays_nearer_to_the_source(editor, coffee, sampler):
    source = scaled_source(editor, coffee)
    distances = []
    for strength in (0.1, 0.5, 1.0):
        how = {"fidelity": f"start:strength={strength}", "sampler": sampler, "num_steps": 10}
        result = editor.edit(coffee, "x", **how)
        distances.append((result.latents[0] - source).square().mean().sqrt().item())
        per_step = 2 if sampler == "heun" else 1
        steps = round(10 * strength) * per_step - (sampler == "heun")
        assert result.evaluations == [3 * steps]
    assert distances[0] < distances[1] < distances[2]
    assert distances[0] < 0.2 * distances[2]


def test_a_start_is_the_scaled_source_under_the_noise_of_its_step(editor, coffee, monkeypatch):
    seen = []

    def recording(denoiser, x, plan, step_noise):
        seen.append((x, plan))
        return euler(denoiser, x, plan, step_noise)

    recording.traits = euler.traits
    monkeypatch.setitem(SAMPLERS, "euler", recording)
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = []
    for fidelity in ("none", "start:strength=0.6"):
        editor.edit(
            coffee, "x", noise=[noise], sampler="euler", num_steps=5, fidelity=fidelity,
            on_step=lambda now, mine=steps.append: mine((now.step, now.sigma)),
        )  # fmt: skip
    (pure, plan), (x, cut) = seen
    assert torch.equal(pure[0], noise * plan.sigmas[0])
    assert cut.sigmas == plan.sigmas[2:] and len(cut) == 3
    expected = scaled_source(editor, coffee) + noise * plan.sigmas[2]
    torch.testing.assert_close(x[0], expected, atol=1e-5, rtol=1e-5)
    assert steps[5:] == steps[2:5]  # they are called as in the whole run


def test_a_mask_of_guidance_and_a_later_start_go_together(editor, coffee):
    how = {"guidance": "ip2p+mask:threshold=0.99", "sampler": "euler", "num_steps": 4}
    result = editor.edit(coffee, "x", fidelity="start:strength=0.5", **how)
    kept = (result.pixels01[0] == pixels01_from_image(coffee)).all(0)
    assert kept.float().mean() > 0.2


def test_at_full_size_what_a_knob_keeps_is_the_original_bit_for_bit(editor, tmp_path, generator):
    pixels = torch.randint(256, (90, 130, 3), generator=generator, dtype=torch.uint8)
    path = tmp_path / "large.png"
    Image.fromarray(pixels.numpy()).save(path)
    how = {"resolution": 48, "full_size": True, **QUICK}
    kept = editor.edit(path, "x", fidelity="mask:threshold=1", **how)
    assert torch.equal(kept.photos[0].pixels, read_photo(path).pixels)
    plain, neutral, knob = (
        editor.edit(path, "x", fidelity=spec, **how).photos[0].pixels
        for spec in ("none", "mask:threshold=0", "wavelet")
    )
    assert torch.equal(plain, neutral) and not torch.equal(plain, knob)
    small = editor.edit(path, "x", fidelity="mask:threshold=1", resolution=48, **QUICK)
    source = pixels01_from_image(fit(load_image(path), 48, editor.vae.config.downscale))
    assert torch.equal(small.pixels01[0], source)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wavlet", r"unknown fidelity knob 'wavlet'; did you mean wavelet\?"),
        ("start:strength=1.2", "fidelity start:strength is '1.2', out of range: expected 0.01 to"),
        (3, "fidelity is 3, expected a text"),
    ],
)
def test_a_stack_that_cannot_be_is_refused_before_anything_runs(editor, coffee, spec, message):
    with pytest.raises(InputError, match=message):
        editor.edit(coffee, "x", fidelity=spec)


def test_the_command_edits_with_knobs_and_records_them(tmp_path):
    from ipx2p.commands.edit import main

    out = tmp_path / "out"
    argv = [str(GOLDEN / "diffusers"), "--image", str(GOLDEN / "coffee_64.png")]
    argv += ["--instruction=x", f"--output={out}", "--resolution=88", "--steps=2", "--device=cpu"]
    main([*argv, "--fidelity=mask:threshold=1"])
    record = json.loads((out / "coffee_64-000.json").read_text())
    assert record["fidelity"] == "mask:threshold=1"
    assert record["fidelity_in_full"] == "mask:threshold=1.0,levels=3"
    source = fit(load_image(GOLDEN / "coffee_64.png"), 88, 8)
    assert load_image(out / "coffee_64-000.png").tobytes() == source.tobytes()
    with pytest.raises(InputError, match="unknown fidelity knob 'musk'; did you mean mask"):
        main([*argv, "--fidelity=musk"])
