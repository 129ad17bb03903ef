"""Guidance in whole edits: cost, batches, both kinds of model, second network, negative, mask."""

import copy
import math
import re

import pytest
import torch
from PIL import Image

from ipx2p.diffusion.guidance.registry import SCHEMES
from ipx2p.diffusion.samplers import make_plan
from ipx2p.editing.editor import Editor
from ipx2p.editing.settings import EditSettings
from ipx2p.errors import InputError
from ipx2p.images import fit, pixels01_from_image
from ipx2p.models.flops import shallow_share
from tests.conftest import GOLDEN
from tests.editing.test_editor import assert_latents_close

NUM_STEPS = 2
QUICK = {
    "num_steps": NUM_STEPS,
    "sampler": "euler",
    "spacing": "trailing",
    "guidance_scale": 4.0,
    "image_guidance_scale": 1.5,
}
# The tiny network has one token in the middle, where attention has nothing to choose.
LAYERS = "layers=down.0/up.3"
ACTING = {name: f"{name}:{LAYERS}" for name in ("pag", "seg", "skip_layer")}
ACTING["skip_layer"] += ",low=0"  # it guides the first steps
ACTING["dynamic_threshold"] = "dynamic_threshold:bound=0.5"
ACTING["mimic"] = "mimic:scale=1.5"
SPECS = [ACTING.get(name, name) for name in SCHEMES]


@pytest.fixture(scope="module")
def pictures(coffee):
    return [coffee.resize((24, 16)), coffee.crop((8, 24, 32, 40)), coffee.crop((0, 0, 24, 16))]


def weaker(unet):
    """The same network, a little worse."""
    weak = copy.deepcopy(unet)
    with torch.no_grad():
        for parameter in weak.parameters():
            parameter.mul_(0.97)
    return weak


@pytest.fixture(scope="module")
def weak(editor):
    return weaker(editor.unet)


@pytest.fixture(scope="module")
def weak_v2(editor_v2):
    return weaker(editor_v2.unet)


@pytest.fixture(scope="module")
def plain_v2(editor_v2, pictures):
    return edit(editor_v2, pictures[:1], "ip2p").latents[0]


def edit(editor, pictures, spec, weak=None, **changes):
    """Edits of these pictures with what the stack needs."""
    count = len(pictures)
    instructions = ["cartoonize it", "make it snow", "derain"][:count]
    needs = {}
    if "autoguidance" in spec:
        needs["weak"] = weak
    if "perp_neg" in spec:
        needs["negative_instructions"] = ["blurry"] * count
    arguments = QUICK | {"seeds": range(count), "guidance": spec} | needs | changes
    return editor.edit(pictures, arguments.pop("instructions", instructions), **arguments)


def declared(spec):
    """Evaluations of an edit that a stack on ip2p declares; None where the scales decide."""
    scheme = SCHEMES[spec.partition(":")[0]]
    if scheme.is_linear:
        return scheme.about.evaluations * NUM_STEPS
    if scheme.name in ("interval", "schedule", "deepcache"):
        return None
    return (3 + scheme.about.evaluations) * NUM_STEPS + scheme.about.evaluations_once


@pytest.mark.parametrize("spec", SPECS)
def test_an_edit_does_not_depend_on_its_batch_and_costs_what_is_declared(
    editor, weak, pictures, spec
):
    together = edit(editor, pictures[:2], spec, weak)
    alone = edit(
        editor, pictures[1:2], spec, weak, seeds=[1], instructions=["make it snow"],
        batch_branches=False,
    )  # fmt: skip
    assert_latents_close(alone.latents[0], together.latents[1])
    assert together.evaluations == alone.evaluations * 2
    assert declared(spec) in (None, alone.evaluations[0])
    assert alone.evaluations[0] <= 4 * NUM_STEPS + 2


@pytest.mark.parametrize("spec", ["joint", "apg", "power_law"])
def test_heun_from_the_noise_of_zero_snr_does_not_depend_on_the_batch(editor_v2, pictures, spec):
    how = {"sampler": "heun", "num_steps": 3, "guidance_scale": 7.0}
    together = edit(editor_v2, pictures, spec, **how)
    for place, instruction in enumerate(("cartoonize it", "make it snow", "derain")):
        one = {"seeds": [place], "instructions": [instruction]}
        alone = edit(editor_v2, pictures[place : place + 1], spec, **how, **one)
        assert_latents_close(alone.latents[0], together.latents[place])


@pytest.mark.parametrize("spec", SPECS)
def test_v_prediction_is_guided_too(editor_v2, weak_v2, plain_v2, pictures, spec):
    latents = edit(editor_v2, pictures[:1], spec, weak_v2).latents[0]
    assert latents.isfinite().all()
    if spec != "ip2p":
        assert (latents - plain_v2).abs().max() > 1e-6


@pytest.fixture(scope="module")
def half():
    return Editor.load(GOLDEN / "diffusers", device="cpu", dtype="bfloat16")


@pytest.mark.parametrize("spec", SPECS)
def test_every_scheme_edits_in_bfloat16(half, weak, pictures, spec):
    latents = edit(half, pictures[:1], spec, copy.deepcopy(weak).bfloat16()).latents[0]
    assert latents.isfinite().all() and latents.dtype == torch.float32


def test_bfloat16_stays_near_float32(half, editor, weak, pictures):
    spec = f"apg+rescale+autoguidance+perp_neg+pag:{LAYERS}+interval:low=0.1,high=10"
    scales = {"guidance_scale": 1.5, "image_guidance_scale": 1.2}
    got = edit(half, pictures[:1], spec, copy.deepcopy(weak).bfloat16(), **scales)
    expected = edit(editor, pictures[:1], spec, weak, **scales)
    assert_latents_close(got.latents[0], expected.latents[0], 0.1)


def test_an_interval_saves_evaluations(editor, pictures):
    plan = make_plan(editor.schedule, "heun", "linspace", 8)
    inside = sum(0.28 < sigma <= 5.42 for sigma in plan.sigmas[:-1])
    assert 2 <= inside <= 6
    result = edit(editor, pictures[:1], "interval", sampler="heun", spacing="linspace", num_steps=8)
    # Heun evaluates twice a step, but in the last one, which goes to sigma 0.
    assert result.evaluations == [2 * (3 * inside + 8 - inside) - 1]


def test_autoguidance_loads_and_checks_its_second_network(editor, pictures, weak, tmp_path):
    loaded = editor.load_weak(GOLDEN / "diffusers")
    # A network is no worse than itself.
    same = edit(editor, pictures[:1], "autoguidance", loaded)
    assert_latents_close(same.latents[0], edit(editor, pictures[:1], "ip2p").latents[0])
    worse = edit(editor, pictures[:1], "autoguidance", weak)
    assert (worse.latents[0] - same.latents[0]).abs().max() > 1e-3
    with pytest.raises(InputError, match="dtype of the weak network is torch.bfloat16"):
        edit(editor, pictures[:1], "autoguidance", copy.deepcopy(weak).bfloat16())
    with pytest.raises(InputError, match="diffusers_v2: .* the weak network must match it"):
        editor.load_weak(GOLDEN / "diffusers_v2")


def test_a_perpendicular_negative_leaves_the_null_text_empty(editor, pictures):
    none = edit(editor, pictures[:1], "perp_neg:strength=0")
    assert_latents_close(none.latents[0], edit(editor, pictures[:1], "ip2p").latents[0])
    # What is asked for cannot be taken away.
    same = edit(editor, pictures[:1], "perp_neg", negative_instructions=["cartoonize it"])
    assert_latents_close(same.latents[0], none.latents[0], 1e-3)
    other = edit(editor, pictures[:1], "perp_neg")
    assert (other.latents[0] - none.latents[0]).abs().max() > 1e-3


def test_the_source_stays_outside_the_mask(editor, coffee):
    picture = coffee.resize((48, 32))
    result = edit(editor, [picture], "mask:threshold=0.3", num_steps=4)
    source = pixels01_from_image(fit(picture, None, 8))
    kept = (result.pixels01[0] - source).abs().amax(0) == 0
    assert 0.02 < kept.float().mean() < 0.98
    plain = edit(editor, [picture], "ip2p", num_steps=4)
    assert ((plain.pixels01[0] - source).abs().amax(0) == 0).float().mean() < 0.01
    pixels = editor.vae.encode(2 * source[None] - 1).mode()
    kept_latents = (result.latents[0] - editor.vae.scale(pixels)[0]).abs().amax(0) < 1e-3
    assert kept_latents.any() and not kept_latents.all()


def test_an_edit_with_a_mask_starts_from_the_noised_source(editor, coffee):
    """So what the mask keeps is the source under the edit's noise, at the level of each step."""
    picture = coffee.resize((24, 16))
    seen = []
    run = editor.unet.forward
    editor.unet.forward = lambda latents, *rest: seen.append(latents) or run(latents, *rest)
    try:
        noise = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1))
        edit(editor, [picture], "mask", noise=[noise], batch_branches=False)
    finally:
        del editor.unet.forward
    pixels = pixels01_from_image(fit(picture, None, 8))[None]
    source = editor.vae.scale(editor.vae.encode(2 * pixels - 1).mode())[0]
    sigma = editor.schedule.sigma(999)
    started = seen[2][0] * math.sqrt(1 + sigma**2)  # after both looks for the mask
    torch.testing.assert_close(started, source + sigma * noise, rtol=1e-4, atol=1e-4)
    level = editor.schedule.sigma(0.8 * 999)
    looked = seen[0][0] * math.sqrt(1 + level**2)
    torch.testing.assert_close(looked, source + level * noise, rtol=1e-4, atol=1e-4)


def test_noise_on_the_instruction_belongs_to_the_seed(editor, pictures):
    one, two = pictures[0], [pictures[0]] * 2
    a, b = edit(editor, two, "cads", seeds=[4, 5], instructions=["x", "x"]).latents
    again = edit(editor, [one], "cads", seeds=[4], instructions=["x"]).latents[0]
    assert_latents_close(again, a)
    assert (a - b).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance": "autoguidance"}, "autoguidance needs a second, weaker network: --weak-w"),
        ({"weak": "weak"}, "a weak network is given, but guidance ip2p does not use one"),
        ({"guidance": "perp_neg"}, "perp_neg needs a negative instruction"),
        ({"guidance": "perp_neg", "negative_instructions": [" "]}, "needs a negative instruction"),
        ({"guidance": "cfgpp", "sampler": "heun"}, "cfgpp does not work with the sampler heun"),
        ({"guidance": "cfgpp", "sampler": "dpmpp_2m"}, "does not work with the sampler dpmpp_2m"),
        ({"guidance": "pag:layers=middle"}, "no attention layer 'middle'; it has down.0.0, "),
    ],
)
def test_what_does_not_go_together_is_refused(editor, weak, pictures, arguments, message):
    if "weak" in arguments:
        arguments = arguments | {"weak": weak}
    with pytest.raises(InputError, match=message) as error:
        editor.edit(pictures[:1], ["x"], num_steps=1, **arguments)
    assert "\n" not in str(error.value)


def test_settings_take_a_stack_as_text():
    EditSettings(guidance="apg:eta=0,norm=7.5+interval:low=0.28,high=5.4+rescale:phi=0.7").check()
    with pytest.raises(InputError, match=re.escape("cfgpp does not work with the sampler heun")):
        EditSettings(guidance="cfgpp", sampler="heun").check()
    with pytest.raises(InputError, match="eta is '2', out of range: expected 0 to 1"):
        EditSettings(guidance="apg:eta=2").check()


def test_seconds_and_evaluations_are_of_each_edit(editor, pictures):
    result = edit(editor, [*pictures[:2], Image.new("RGB", (16, 16))], "ip2p", batch_size=2)
    assert result.evaluations == [3 * NUM_STEPS] * 3
    assert all(0 < seconds < math.inf for seconds in result.seconds)


@pytest.mark.parametrize(
    ("spec", "projections"), [("ip2p", 1), ("ip2p+cads", NUM_STEPS), ("deepcache", 1)]
)
def test_the_instruction_is_projected_once_unless_it_changes(
    editor, pictures, monkeypatch, spec, projections
):
    calls, project = [], editor.unet.project_text
    monkeypatch.setattr(
        editor.unet, "project_text", lambda text: calls.append(len(text)) or project(text)
    )
    [projected] = edit(editor, pictures[:1], spec, seeds=[4], instructions=["x"]).latents
    assert len(calls) == projections and calls[0] == 3  # branches in a batch
    monkeypatch.setattr(editor.unet, "project_text", lambda text: text)
    [plain] = edit(editor, pictures[:1], spec, seeds=[4], instructions=["x"]).latents
    assert torch.equal(projected, plain)


def test_deepcache_in_every_step_is_the_plain_edit_bit_for_bit(editor, weak, pictures):
    for spec in ("ip2p", f"autoguidance+pag:{LAYERS}+mask+interval:low=0.1"):
        one, plain = (
            edit(editor, pictures[:2], f"{spec}{more}", weak, num_steps=3)
            for more in ("+deepcache:every=1", "")
        )
        for got, expected in zip(one.latents, plain.latents, strict=True):
            assert torch.equal(got, expected)
        assert one.evaluations == plain.evaluations


@pytest.mark.parametrize("spec", ["free", "cads+free"])
def test_an_edit_with_deepcache_is_that_of_the_unet_given_its_deep_feature(
    editor, pictures, monkeypatch, spec
):
    """Euler's steps, with the feature kept here in the place of the guidance."""
    run, steps = editor.unet.forward, []

    def forward(*shown, deep=None):
        assert deep is None
        if len(steps) % 3 == 0:
            steps.append([])
        else:
            steps.append(steps[-1])
        return run(*shown, deep=steps[-1])

    expected = edit(editor, pictures[:2], f"{spec}+deepcache:every=3", num_steps=5)
    monkeypatch.setattr(editor.unet, "forward", forward)
    got = edit(editor, pictures[:2], spec, num_steps=5)
    assert len(steps) == 5
    for one, other in zip(got.latents, expected.latents, strict=True):
        assert torch.equal(one, other)


def test_an_evaluation_of_the_shallow_part_costs_its_share_of_the_flops(editor, pictures, weak):
    share = shallow_share(editor.unet.config, 2, 3)  # of 24 x 16 pixels
    assert 0.1 < share < 0.5
    result = edit(editor, pictures[:1], "deepcache:every=3", num_steps=7)
    assert result.evaluations == [pytest.approx(3 * (3 + 4 * share), abs=0.01)]
    assert f"{result.evaluations[0]:g} evaluations" in repr(result)
    spec = f"deepcache:every=2+autoguidance+pag:{LAYERS}"
    result = edit(editor, pictures[:1], spec, weak, sampler="heun", num_steps=3)
    # Steps 1 and 3 are whole, with two evaluations and one.
    assert result.evaluations == [pytest.approx(5 * (3 + 2 * share), abs=0.01)]
