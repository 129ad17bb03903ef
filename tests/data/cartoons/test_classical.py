"""The cartoon filter without weights."""

import pytest
import torch
from PIL import Image

from ipx2p.data.cartoons.classical import (
    LEVELS,
    SATURATION,
    VERSION,
    cartoonize,
    oklab_from_pixels01,
    pixels01_from_oklab,
)
from ipx2p.images import load_image, pixels01_from_image
from tests.conftest import ROOT


def plain(*colour, size=(64, 64)):
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, *size).contiguous()


def lightness(pixels01):
    return oklab_from_pixels01(pixels01)[:, 0]


@pytest.fixture(scope="module")
def photo():
    image = load_image(ROOT / "assets" / "photos" / "astronaut.jpg")
    return pixels01_from_image(image.resize((192, 192), Image.Resampling.LANCZOS))[None]


@pytest.fixture(scope="module")
def cartoon(photo):
    return cartoonize(photo)


def test_oklab_has_the_published_values_and_an_inverse(generator):
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    expected = [[1.0, 0.0, 0.0], [0.628, 0.2249, 0.1258], [0.452, -0.0325, -0.3115]]
    lab = oklab_from_pixels01(colours.T.view(1, 3, 1, 3))
    torch.testing.assert_close(lab[0, :, 0].T, torch.tensor(expected), atol=2e-4, rtol=0)
    colours = torch.rand(2, 3, 8, 8, generator=generator)
    back = pixels01_from_oklab(oklab_from_pixels01(colours))
    torch.testing.assert_close(back, colours, atol=1e-4, rtol=0)


def test_a_plain_area_stays_plain_and_gets_a_little_more_colour():
    before, after = plain(0.6, 0.45, 0.4), cartoonize(plain(0.6, 0.45, 0.4))
    assert (after - after[..., :1, :1]).abs().max() < 1e-5
    assert (lightness(after) - lightness(before)).abs().max() <= 0.5 / LEVELS
    ratio = oklab_from_pixels01(after)[:, 1:] / oklab_from_pixels01(before)[:, 1:]
    torch.testing.assert_close(ratio, torch.full_like(ratio, SATURATION), atol=1e-2, rtol=0)


def test_lightness_comes_in_few_levels():
    ramp = torch.linspace(0, 1, 400).expand(1, 3, 40, 400).contiguous()
    levels = lightness(cartoonize(ramp)) * LEVELS
    assert ((levels - levels.round()).abs() < 0.1).float().mean() > 0.5
    assert {*levels.round().flatten().tolist()} == {*range(LEVELS + 1)}


def test_noise_becomes_flat_and_draws_no_lines(generator):
    grey = 0.5 + 0.04 * torch.randn(1, 3, 96, 96, generator=generator)
    after = cartoonize(grey.clamp(0, 1))
    assert after.std() < 0.25 * grey.std()
    assert lightness(after).min() > lightness(grey).mean() - 1.5 / LEVELS


def test_an_edge_gets_a_line_on_its_dark_side_and_no_halo():
    size = (96, 48)
    picture = torch.cat([plain(0.35, 0.4, 0.5, size=size), plain(0.9, 0.8, 0.7, size=size)], 3)
    rows = lightness(cartoonize(picture))[0]
    torch.testing.assert_close(rows, rows[:1].expand_as(rows), atol=1e-4, rtol=0)
    row = rows[0]
    dark, light = row[5], row[-5]
    line = (row < dark - 0.1).nonzero().flatten().tolist()
    assert 0 < len(line) <= 4 and line == [*range(line[0], line[-1] + 1)]
    assert line[0] >= 44 and line[-1] <= 48
    assert (row[:40] - dark).abs().max() < 0.01 and (row[52:] - light).abs().max() < 0.01
    assert row.max() < light + 0.01


def test_colours_of_equal_lightness_are_parted_by_a_line():
    lab = torch.tensor([0.6, 0.1, 0.05]).view(1, 3, 1, 1).expand(1, 3, 64, 64).clone()
    lab[..., 32:] *= torch.tensor([1, -1, -1]).view(1, 3, 1, 1)
    row = lightness(cartoonize(pixels01_from_oklab(lab)))[0, 32]
    assert row[28:36].min() < row[[4, -4]].min() - 0.1


def test_lines_grow_with_the_picture():
    def ink(side):
        bar = torch.full((1, 3, side // 2, 2 * side), 0.85)
        bar[..., side : side + side // 4] = 0.4
        return int((lightness(cartoonize(bar))[0, side // 4] < 0.3).sum())

    assert ink(256) < ink(512) / 1.4 and ink(512) / 2.5 < ink(256)


def test_it_repeats_bit_for_bit_and_leaves_its_argument_alone(photo, cartoon):
    before = photo.clone()
    assert torch.equal(cartoonize(photo), cartoon)
    assert torch.equal(photo, before)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (7, 5), (8, 130)])
def test_any_size_keeps_its_size(size, generator):
    after = cartoonize(torch.rand(2, 3, *size, generator=generator))
    assert after.shape == (2, 3, *size) and after.dtype == torch.float32
    assert after.isfinite().all() and after.min() >= 0 and after.max() <= 1


def test_everything_is_made_on_the_device_of_the_picture():
    assert cartoonize(torch.empty(1, 3, 20, 30, device="meta")).device.type == "meta"


def test_a_photograph_gets_flat_areas_and_dark_lines(photo, cartoon):
    def steps(pixels01):
        return lightness(pixels01).diff(dim=-1).abs()

    assert (steps(cartoon) < 0.005).float().mean() > 1.5 * (steps(photo) < 0.005).float().mean()
    assert steps(cartoon).quantile(0.99) > steps(photo).quantile(0.99)
    assert (cartoon - photo).abs().mean() < 0.12  # and is still the same picture


def test_a_changed_filter_is_a_new_version(cartoon):
    """Data sets record the version: raise VERSION whenever these values have to change."""
    assert VERSION == 1
    values = torch.nn.functional.adaptive_avg_pool2d(cartoon, 2)[0].flatten()
    expected = [
        0.5296,
        0.6448,
        0.687,
        0.2628,
        0.4326,
        0.6034,
        0.2782,
        0.1827,
        0.406,
        0.574,
        0.1701,
        0.1559,
    ]
    torch.testing.assert_close(values, torch.tensor(expected), atol=1e-3, rtol=0)
