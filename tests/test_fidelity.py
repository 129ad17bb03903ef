"""Knobs of fidelity on pixels, their stacks, and how these are written."""

import re

import pytest
import torch
import torch.nn.functional as F

from ipx2p.errors import InputError
from ipx2p.fidelity import EARLY, KNOBS, AdaIN, Mask, Start, Transfer, Wavelet, parse_fidelity
from ipx2p.transfer import low_pass
from tests.conftest import ROOT

NEUTRAL = {name: f"{name}:{made.neutral[0]}={made.neutral[1]}" for name, made in KNOBS.items()}
PIXELS = [name for name, made in KNOBS.items() if made not in EARLY]


@pytest.fixture
def pair(generator):
    """A source and an edit of it, smooth colours with detail of their own, (3, 40, 56)."""

    def picture(height=40, width=56):
        coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator)
        smooth = F.interpolate(coarse, (height, width), mode="bicubic")[0]
        return (smooth + 0.05 * torch.randn(3, height, width, generator=generator)).clamp(0, 1)

    return picture(), picture()


def published_split(pixels01, levels=5):
    """High and low part as the paper's code takes them, with a kernel of two dimensions."""
    line = torch.tensor([1.0, 2.0, 1.0])
    kernel = (line[:, None] * line / 16).expand(3, 1, 3, 3)
    high, low = torch.zeros_like(pixels01), pixels01
    for level in range(levels):
        radius = 2**level
        padded = F.pad(low[None], [radius] * 4, mode="replicate")
        smoothed = F.conv2d(padded, kernel, groups=3, dilation=radius)[0]
        high, low = high + (low - smoothed), smoothed
    return high, low


@pytest.mark.parametrize("levels", [1, 3, 5])
def test_the_wavelet_split_sums_to_the_picture_and_is_the_published_one(pair, levels):
    source, edit = pair
    high, low = published_split(edit, levels)
    torch.testing.assert_close(high + low, edit)
    torch.testing.assert_close(low_pass(edit, levels), low)
    expected = high + published_split(source, levels)[1]
    torch.testing.assert_close(Wavelet(1.0, levels).apply(source, edit), expected)
    half = Wavelet(0.5, levels).apply(source, edit)
    torch.testing.assert_close(half, (edit + expected) / 2)


def test_smoothing_over_levels_has_the_variance_that_it_says():
    point = torch.zeros(1, 1, 401)
    point[..., 200] = 1
    for levels in (1, 2, 3, 5):
        smoothed = low_pass(point, levels)[0, 0].double()
        assert smoothed.sum().item() == pytest.approx(1, abs=1e-6)
        variance = (smoothed * (torch.arange(401) - 200) ** 2).sum().item()
        assert variance == pytest.approx((4**levels - 1) / 6, rel=1e-5)


def test_a_cast_over_the_picture_is_taken_back_by_both_colour_fixes(pair):
    source, _ = pair
    cast = 0.7 * source + torch.tensor([0.2, 0.1, 0.0])[:, None, None]
    torch.testing.assert_close(AdaIN().apply(source, cast), source, atol=1e-3, rtol=0)
    shifted = source + torch.tensor([0.2, 0.1, 0.0])[:, None, None]
    torch.testing.assert_close(Wavelet().apply(source, shifted), source)


def test_adain_gives_each_channel_the_moments_of_the_source(pair):
    source, edit = pair
    fixed = AdaIN().apply(source, edit)
    torch.testing.assert_close(fixed.mean((1, 2)), source.mean((1, 2)))
    # The variances have 1e-5 added, so that a flat channel divides by no 0.
    eps = 1e-5
    expected = (source.var((1, 2)) + eps) * edit.var((1, 2)) / (edit.var((1, 2)) + eps)
    torch.testing.assert_close(fixed.var((1, 2)), expected)
    flat = torch.full_like(edit, 0.3)
    fixed = AdaIN().apply(source, flat)
    torch.testing.assert_close(fixed, source.mean((1, 2), keepdim=True).expand_as(flat))


def test_a_mask_keeps_the_source_where_little_changed_with_soft_edges(pair):
    source, _ = pair
    edit = source + 0.02  # as an autoencoder errs
    edit[:, :, 28:] = source[:, :, 28:] + 0.3
    knob = Mask(threshold=0.1, levels=2)
    mask, masked = knob.mask(source, edit), knob.apply(source, edit)
    assert mask.shape == (1, 40, 56)
    assert not mask[..., :22].any() and (mask[..., 34:] == 1).all()  # 3 + 3 pixels from the change
    assert torch.equal(masked[..., :22], source[..., :22])
    assert torch.equal(masked[..., 34:], edit[..., 34:])
    assert (mask.diff() >= 0).all() and mask.diff().max() < 0.4
    assert Mask(threshold=0.009, levels=2).mask(source, edit).min() == 1


def test_a_mask_opens_from_the_threshold_to_twice_of_it():
    source = torch.full((3, 8, 8), 0.5)
    for change, expected in {0.05: 0.0, 0.1: 0.0, 0.125: 0.25, 0.15: 0.5, 0.2: 1.0}.items():
        mask = Mask(threshold=0.1).mask(source, source + change)
        torch.testing.assert_close(mask, torch.full((1, 8, 8), expected), atol=1e-5, rtol=1e-5)


def test_transfer_keeps_a_change_of_light_and_drops_invented_detail(pair, generator):
    source, _ = pair
    lighter = 0.6 * source + 0.3
    invented = lighter + 0.03 * torch.randn(source.shape, generator=generator)
    for by in ("auto", "affine"):
        errors = [
            (Transfer(weight, by).apply(source, invented) - lighter).square().mean().sqrt().item()
            for weight in (0.0, 0.5, 1.0)
        ]
        assert errors[2] < 0.4 * errors[0] and errors[1] < 0.7 * errors[0]
    same = Transfer().apply(source, source)
    assert torch.equal(same, source)


@pytest.mark.parametrize("name", PIXELS)
def test_at_its_neutral_value_a_knob_gives_the_edit_bit_for_bit(pair, name):
    source, edit = pair
    (knob,) = parse_fidelity(NEUTRAL[name])
    assert not knob.acts
    assert torch.equal(parse_fidelity(NEUTRAL[name]).apply(source, edit), edit)
    if name != "mask":  # whose threshold divides
        assert torch.equal(knob.apply(source, edit), edit)


@pytest.mark.parametrize("name", PIXELS)
def test_near_its_neutral_value_a_knob_changes_little(pair, name):
    source, edit = pair
    far, near = (
        (parse_fidelity(f"{name}:{KNOBS[name].neutral[0]}={value}").apply(source, edit) - edit)
        for value in (0.2, 0.002)
    )
    assert near.abs().mean() < 0.05 * far.abs().mean()


@pytest.mark.parametrize("name", PIXELS)
def test_without_an_edit_every_knob_gives_the_source(pair, name):
    source, _ = pair
    result = parse_fidelity(name).apply(source, source)
    torch.testing.assert_close(result, source, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", PIXELS)
def test_a_knob_leaves_its_arguments_and_the_range_alone(pair, name):
    source, edit = pair[0], pair[1].round()
    before = source.clone(), edit.clone()
    result = parse_fidelity(name).apply(source, edit)
    assert torch.equal(source, before[0]) and torch.equal(edit, before[1])
    assert result.min() >= 0 and result.max() <= 1 and result.shape == edit.shape


def test_knobs_act_in_the_order_in_which_they_are_written(pair):
    source, edit = pair
    mask, wavelet = Mask(threshold=0.15), Wavelet(levels=2)
    one = parse_fidelity("mask:threshold=0.15+wavelet:levels=2").apply(source, edit)
    other = parse_fidelity("wavelet:levels=2+mask:threshold=0.15").apply(source, edit)
    assert torch.equal(one, wavelet.apply(source, mask.apply(source, edit).clamp(0, 1)).clamp(0, 1))
    assert torch.equal(
        other, mask.apply(source, wavelet.apply(source, edit).clamp(0, 1)).clamp(0, 1)
    )
    assert not torch.allclose(one, other, atol=1e-3)


def test_a_stack_says_itself_in_full_and_neutral_knobs_are_no_part_of_it():
    spec = parse_fidelity("mask:levels=2+start+wavelet:weight=0")
    assert str(spec) == (
        "start:strength=0.8+mask:threshold=0.02,levels=2+wavelet:weight=0.0,levels=5"
    )
    assert parse_fidelity(str(spec)) == spec
    assert str(spec.acting) == "start:strength=0.8+mask:threshold=0.02,levels=2"
    assert spec.find(Start) == Start(0.8) and spec.find(Wavelet) is None
    plain = parse_fidelity("+".join(NEUTRAL.values()))
    assert plain.acting == parse_fidelity("none").acting == parse_fidelity("none")
    assert str(plain.acting) == "none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wavlet", r"unknown fidelity knob 'wavlet'; did you mean wavelet\?.*none, start, wr"),
        ("mask+", r"unknown fidelity knob 'mask\+'"),
        ("", "unknown fidelity knob ''"),
        ("mask:treshold=0.1", "knob mask has no parameter 'treshold'; did you mean threshold"),
        ("none:weight=1", "fidelity knob none has no parameter 'weight'; it has none"),
        ("wavelet:weight=1.5", "fidelity wavelet:weight is '1.5', out of range: expected 0 to 1"),
        ("wavelet:levels=0", "wavelet:levels is '0', out of range: expected 1 to 8"),
        ("wavelet:levels=2.5", "wavelet:levels is '2.5', expected a whole number"),
        ("start:strength=0", "start:strength is '0', out of range: expected 0.01 to 1"),
        ("start:strength=nan", "start:strength is 'nan', expected a number"),
        ("transfer:by=upscale", "transfer:by is 'upscale', which is not known; known here: auto"),
        ("mask+wavelet+mask", r"fidelity 'mask\+wavelet\+mask' has mask twice: keep one of them"),
        ("mask:levels=1,levels=2", "fidelity knob mask has levels twice"),
        (0.5, "fidelity is 0.5, expected a text such as"),
    ],
)
def test_a_stack_that_cannot_be_gets_one_line(text, message):
    with pytest.raises(InputError, match=message) as error:
        parse_fidelity(text)
    assert "\n" not in str(error.value)


def test_the_guide_tells_of_every_knob_with_its_parameters_and_neutral_value():
    guide = (ROOT / "docs" / "fidelity.md").read_text()
    for name, made in KNOBS.items():
        [row] = [line for line in guide.splitlines() if line.startswith(f"| `{name}`")]
        parameter, value = made.neutral
        assert f"`{parameter}` {value:g}" in row
        for known in re.findall(r"(\w+)=", str(parse_fidelity(name))):
            assert f"`{known}`" in row, (name, known)
