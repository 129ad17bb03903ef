"""Whole edits: against the reference, and independent of what they run beside."""

import copy
import json
import math
import re

import pytest
import torch
from PIL import Image

from ipx2p.diffusion.samplers import SAMPLERS, euler_ancestral
from ipx2p.editing.editor import Editor
from ipx2p.editing.settings import EditSettings
from ipx2p.errors import InputError
from ipx2p.images import pixels01_from_image
from tests.conftest import GOLDEN

EDITS = [
    tuple(name.split("."))
    for name in json.loads((GOLDEN / "golden.json").read_text())["schedulers"]
    if not name.startswith("edit_v2")
]
INSTRUCTION = "cartoonize the image"
QUICK = {"num_steps": 3, "sampler": "euler_ancestral"}


def assert_latents_close(got, expected, tolerance=1e-4):
    """Within a share of the standard deviation of the expected latents."""
    assert (got - expected).abs().max() <= tolerance * expected.std()


@pytest.mark.parametrize("batch_branches", [True, False])
@pytest.mark.parametrize(("sampler", "spacing"), EDITS)
def test_edit_matches_the_reference(golden, editor, coffee, sampler, spacing, batch_branches):
    result = editor.edit(
        [coffee],
        [INSTRUCTION],
        sampler=sampler,
        spacing=spacing,
        noise=[golden["edit.noise"][0]],
        step_noise=[golden["edit.step_noise"][:, 0]],
        batch_branches=batch_branches,
    )
    assert_latents_close(result.latents[0], golden[f"edit.{sampler}.{spacing}.latents"][0])
    expected = golden[f"edit.{sampler}.{spacing}.image"][0].permute(2, 0, 1)
    torch.testing.assert_close(result.pixels01[0], expected, atol=1e-4, rtol=0)
    shown = pixels01_from_image(result.images[0])
    torch.testing.assert_close(shown, expected, atol=0.5 / 255 + 1e-4, rtol=0)


def test_v_prediction_with_zero_snr_matches_the_reference(golden, editor_v2, coffee):
    result = editor_v2.edit(
        [coffee],
        ["denoise the photo"],
        sampler="euler",
        spacing="trailing",
        guidance_scale=3.0,
        image_guidance_scale=1.2,
        noise=[golden["edit_v2.noise"][0]],
    )
    assert_latents_close(result.latents[0], golden["edit_v2.euler.trailing.latents"][0])
    expected = golden["edit_v2.euler.trailing.image"][0].permute(2, 0, 1)
    torch.testing.assert_close(result.pixels01[0], expected, atol=1e-4, rtol=0)


def pictures():
    """Pictures of three sizes, two of them alike."""
    source = torch.Generator().manual_seed(1)
    sizes = [(32, 48), (32, 48), (48, 32), (16, 16)]
    return [
        Image.fromarray(torch.randint(256, (h, w, 3), generator=source, dtype=torch.uint8).numpy())
        for w, h in sizes
    ]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_edit_does_not_depend_on_its_batch(editor, batch_size):
    instructions, seeds = ["a", "b", INSTRUCTION, "d"], [3, 1, 4, 1]
    together = editor.edit(pictures(), instructions, seeds=seeds, batch_size=batch_size, **QUICK)
    for i, picture in enumerate(pictures()):
        alone = editor.edit([picture], [instructions[i]], seeds=[seeds[i]], **QUICK)
        assert_latents_close(alone.latents[0], together.latents[i])
        assert alone.images[0].size == together.images[i].size == picture.size


def test_noise_of_an_edit_is_that_of_its_seed_bit_for_bit(editor, coffee, monkeypatch):
    seen = []

    def recording(denoiser, x, plan, step_noise):
        seen.append((x, step_noise(0), step_noise(1)))
        return euler_ancestral(denoiser, x, plan, step_noise)

    recording.traits = euler_ancestral.traits
    monkeypatch.setitem(SAMPLERS, "euler_ancestral", recording)
    editor.edit([coffee] * 3, ["a", "b", "c"], seeds=[5, 6, 7], **QUICK)
    editor.edit([coffee], ["z"], seeds=[6], **QUICK)
    for batched, alone in zip(*seen, strict=True):
        assert torch.equal(batched[1], alone[0])
        assert not torch.equal(batched[0], batched[1])
    assert not torch.equal(seen[1][1], seen[1][2])


def test_equal_seeds_repeat_and_others_differ(editor, coffee):
    a, b, c = editor.edit([coffee] * 3, ["x"] * 3, seeds=[1, 1, 2], **QUICK).latents
    assert_latents_close(a, b)
    assert (a - c).abs().max() > 0.1


def test_negative_instruction_takes_the_place_of_the_null_text(editor, coffee):
    one = editor.edit([coffee], ["x"], negative_instructions=[""], **QUICK).latents[0]
    assert torch.equal(one, editor.edit([coffee], ["x"], **QUICK).latents[0])
    other = editor.edit([coffee], ["x"], negative_instructions=["rain"], **QUICK).latents[0]
    assert (one - other).abs().max() > 1e-3
    # Steering away from the instruction itself cancels its push.
    same = editor.edit([coffee], ["x"], negative_instructions=["x"], **QUICK).latents[0]
    weak = editor.edit([coffee], ["x"], negative_instructions=["x"], guidance_scale=1, **QUICK)
    assert_latents_close(same, weak.latents[0], 1e-3)


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [
        ((64, 64), None, (64, 64)),
        ((17, 400), None, (16, 400)),
        ((1, 1), None, (8, 8)),
        ((1, 1), 32, (32, 32)),
        ((17, 4000), 64, (8, 64)),
        ((100, 50), 64, (64, 32)),
        ((70, 66), 60, (64, 56)),
    ],
)
def test_result_has_the_size_asked_for(editor, size, resolution, expected):
    picture = Image.new("RGB", size, "teal")
    result = editor.edit([picture], ["x"], resolution=resolution, num_steps=1)
    assert result.images[0].size == expected
    assert result.pixels01[0].shape == (3, expected[1], expected[0])
    assert result.latents[0].shape == (4, expected[1] // 8, expected[0] // 8)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_pictures_of_any_mode_are_edited(editor, mode):
    result = editor.edit([Image.new(mode, (16, 16))], ["x"], num_steps=1)
    assert result.images[0].mode == "RGB"


def test_no_pictures_give_no_edits(editor):
    assert editor.edit([], []).images == []


def assert_same_edits(one, other):
    assert len(one.latents) == len(other.latents)
    assert all(torch.equal(a, b) for a, b in zip(one.latents, other.latents, strict=True))


def test_one_picture_and_one_sentence_need_no_lists(editor, coffee, tmp_path):
    alone = editor.edit(coffee, "x", negative_instructions="rain", seeds=3, **QUICK)
    listed = editor.edit([coffee], ["x"], negative_instructions=["rain"], seeds=[3], **QUICK)
    assert_same_edits(alone, listed)
    coffee.save(tmp_path / "coffee.png")
    for path in (tmp_path / "coffee.png", str(tmp_path / "coffee.png")):
        assert_same_edits(editor.edit(path, "x", **QUICK), editor.edit([coffee], ["x"], **QUICK))
    with pytest.raises(InputError, match=r"nowhere\.png: cannot be read"):
        editor.edit("nowhere.png", "x")


def test_what_is_given_once_serves_every_edit(editor, coffee):
    several = editor.edit(coffee, "x", seeds=[1, 2, 3], batch_size=1, **QUICK)
    for seed, latents in zip([1, 2, 3], several.latents, strict=True):
        assert torch.equal(latents, editor.edit(coffee, "x", seeds=seed, **QUICK).latents[0])
    assert len(editor.edit(coffee, ["x", "y"], num_steps=1).images) == 2
    pair = editor.edit(pictures()[:2], "x", negative_instructions="rain", **QUICK)
    listed = editor.edit(pictures()[:2], ["x"] * 2, negative_instructions=["rain"] * 2, **QUICK)
    assert_same_edits(pair, listed)


def test_results_and_editors_print_in_one_line(editor, coffee):
    result = editor.edit([coffee, coffee.resize((16, 24))], "x", num_steps=1)
    cost = "6 evaluations, [0-9.]+ s"
    assert re.fullmatch(rf"EditResult\(2 images, 64 x 64, 16 x 24 pixels, {cost}\)", repr(result))
    assert re.fullmatch(
        r"Editor\(U-Net of 0\.\d M parameters, 128 px, float32 on cpu\)", repr(editor)
    )
    assert repr(editor.edit([], [])) == "EditResult(0 images, no pixels, 0 evaluations, 0.0 s)"


@pytest.mark.parametrize(("sampler", "per_step"), [("euler", 1), ("heun", 2)])
def test_every_evaluation_of_the_sampler_can_be_watched(editor, coffee, sampler, per_step):
    seen = []
    images = [coffee, coffee.resize((16, 16)), coffee]
    result = editor.edit(images, "x", sampler=sampler, num_steps=3, on_step=seen.append)
    of_two = [one for one in seen if one.edits == [0, 2]]
    assert {tuple(one.edits) for one in seen} == {(0, 2), (1,)}
    steps = [one.step.index for one in of_two]
    assert steps == sorted(steps) and {*steps} == {0, 1, 2} and steps.count(0) == per_step
    assert [one.evaluations for one in of_two] == [3 * (n + 1) for n in range(len(of_two))]
    assert of_two[-1].evaluations == result.evaluations[0]
    first, last = of_two[0], of_two[-1]
    assert first.x.shape == first.denoised.shape == (2, 4, 8, 8)
    assert first.sigma == first.step.sigma > last.sigma
    assert torch.equal(last.denoised[1], result.latents[2])  # the last step ends at sigma 0


def test_the_editor_comes_from_the_package_itself(editor):
    import ipx2p

    assert ipx2p.Editor is Editor
    with pytest.raises(AttributeError, match="no attribute 'Editr'"):
        _ = ipx2p.Editr


def test_results_are_handed_over_as_they_are_made(editor, coffee):
    seen = {}
    result = editor.edit(pictures(), ["x"] * 4, num_steps=1, batch_size=1, on_edit=seen.__setitem__)
    assert seen.keys() == {0, 1, 2, 3}
    assert all(seen[i].image is result.images[i] for i in seen)
    assert result.evaluations == [3] * 4 and min(result.seconds) > 0


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_what_is_not_finite_ends_the_edit(editor, coffee, part):
    broken = Editor(
        copy.deepcopy(editor.unet), copy.deepcopy(editor.vae), editor.text, editor.schedule
    )
    if part == "unet":
        broken.unet.conv_out.bias.data[0] = math.nan
        message = "latents are not finite from step 1 of 3 on, U-Net in float32"
    else:
        broken.vae.decoder.conv_out.bias.data[0] = math.inf
        message = "decoded pixels are not finite, VAE in float32"
    with pytest.raises(InputError, match=message):
        broken.edit([coffee], ["x"], **QUICK)


def test_the_step_at_which_latents_stop_being_finite_is_named(editor, coffee, monkeypatch):
    def overflowing(denoiser, x, plan, step_noise):
        for step in plan:
            x = denoiser(x, step.sigma, step) * (math.inf if step.index == 4 else 1)
        return x

    overflowing.traits = SAMPLERS["euler"].traits
    monkeypatch.setitem(SAMPLERS, "euler", overflowing)
    with pytest.raises(InputError, match="latents are not finite from step 6 of 9 on"):
        editor.edit([coffee], ["x"], sampler="euler", num_steps=9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(editor, coffee, dtype):
    half = Editor.load(GOLDEN / "diffusers", device="cpu", dtype=dtype)
    assert half.dtype == getattr(torch, dtype) and half.vae.dtype == torch.float32
    scales = {"guidance_scale": 1.5, "image_guidance_scale": 1.2}
    one = half.edit([coffee], [INSTRUCTION], **QUICK, **scales).latents[0]
    other = editor.edit([coffee], [INSTRUCTION], **QUICK, **scales).latents[0]
    assert_latents_close(one, other, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "eular"}, r"unknown sampler 'eular'; did you mean euler\?.*ddpm, ddim, euler"),
        ({"spacing": "karas"}, r"unknown spacing 'karas'; did you mean karras\?"),
        (
            {"guidance": "cfg"},
            r"unknown guidance scheme 'cfg'; did you mean tcfg.*ip2p, text_first",
        ),
        ({"num_steps": 0}, "0 steps asked for, expected 1"),
        ({"num_steps": -3}, "-3 steps asked for, expected 1"),
        ({"num_steps": 5000}, "5000 steps asked for, expected 1 to 1000"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan, expected a finite number"),
        ({"image_guidance_scale": math.inf}, "image_guidance_scale is inf"),
        ({"instructions": []}, "1 pictures but 0 instructions"),
        ({"instructions": ["  "]}, "the instruction is empty"),
        ({"instructions": ["x", "y"], "seeds": [1, 2, 3]}, "1 pictures but 2 instructions"),
        ({"images": ["a", "b"], "seeds": [1, 2, 3]}, "2 pictures but 3 seeds: give one for each"),
        ({"noise": [torch.zeros(4, 8, 8)] * 2}, "1 edits but 2 noise, expected one each"),
        ({"negative_instructions": []}, "1 pictures but 0 negative_instructions"),
        ({"noise": [torch.zeros(4, 8, 9)]}, r"noise\[0\] has shape .* expected \(4, 8, 8\)"),
        ({"step_noise": [torch.zeros(2, 4, 8, 8)]}, r"step_noise\[0\] has .* \(20, 4, 8, 8\)"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"resolution": 0}, "resolution must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(editor, coffee, arguments, message):
    arguments = {"images": [coffee], "instructions": ["x"], **arguments}
    with pytest.raises(InputError, match=message):
        editor.edit(**arguments)


def test_text_to_image_model_is_refused(editor):
    from ipx2p.models.unet import UNet, UNetConfig

    with torch.device("meta"):
        unet = UNet(UNetConfig(in_channels=4, cross_attention_dim=32))
    with pytest.raises(InputError, match=r"4 input channels, an edit model needs 8.*--edit"):
        Editor(unet, editor.vae, editor.text, editor.schedule)


def test_parts_of_different_models_are_refused(editor, editor_v2):
    with pytest.raises(InputError, match="expects text states of width 32.*gives 48"):
        Editor(editor.unet, editor.vae, editor_v2.text, editor.schedule)


def test_settings_are_checked_before_anything_is_loaded():
    EditSettings().check()
    with pytest.raises(InputError, match="unknown sampler"):
        EditSettings(sampler="x").check()
