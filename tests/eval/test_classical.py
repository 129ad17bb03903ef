"""Restoration without learning is better than doing nothing, and needs only the picture."""

import pytest
import torch
from PIL import Image

from ipx2p.data.degradations.tasks import DegradeConfig, canonical_task, degrade
from ipx2p.eval.classical import CLASSICAL, METHODS, denoise, enhance, noise_level
from ipx2p.images import image_from_pixels01, load_image, pixels01_from_image, resize
from ipx2p.metrics import psnr, ssim
from ipx2p.seeds import generator
from tests.conftest import ROOT

PHOTOS = ("coffee", "kingfisher", "temple", "drums")


@pytest.fixture(scope="module")
def photos():
    images = (load_image(ROOT / "assets" / "photos" / f"{name}.jpg") for name in PHOTOS)
    return [pixels01_from_image(resize(image, (240, 160))) for image in images]


@pytest.mark.parametrize("task", METHODS)
def test_each_method_beats_the_untouched_picture(photos, task):
    targets = torch.stack(photos * 3)
    draws = [generator(0, "test of classical", place) for place in range(len(targets))]
    sources = degrade(targets, task, draws, DegradeConfig())
    edits = [CLASSICAL[task](image_from_pixels01(source)) for source in sources]
    for metric in (psnr, ssim):
        before = metric(sources, targets)
        after = metric(torch.stack([pixels01_from_image(edit) for edit in edits]), targets)
        assert (after - before).mean() > (0 if task == "deblur" else 0.1 * before.mean())


@pytest.mark.parametrize("sigma", [0.02, 0.1])
def test_the_noise_level_is_that_of_noise_on_a_flat_picture(sigma):
    noise = torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(0)) * sigma
    assert noise_level(0.5 + noise) == pytest.approx(sigma / 2, rel=0.05)  # at half the size


def test_a_picture_without_noise_stays_as_it_is():
    flat = torch.full((3, 20, 31), 0.25)
    flat[:, :, 16:] = 0.75
    assert torch.equal(denoise(flat), flat)


def test_the_bilateral_filter_keeps_edges_that_a_gaussian_blurs():
    noise = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(1)) * 0.04
    step = torch.full((3, 64, 64), 0.2)
    step[:, :, 32:] = 0.8
    edit = denoise((step + noise).clamp(0, 1))
    assert (edit - step)[:, :, 31:33].abs().mean() < 0.02
    assert (edit - step).std() < 0.5 * noise.std()


def test_brightening_undoes_an_exposure_without_noise(photos):
    from ipx2p.data.light import linear_from_srgb, srgb_from_linear

    bright, dark = (srgb_from_linear(linear_from_srgb(photos[0]) * k) for k in (1, 1 / 16))
    torch.testing.assert_close(enhance(dark), enhance(bright), atol=2e-3, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 40)])
@pytest.mark.parametrize("value", [0, 255])
def test_small_black_and_white_pictures_stay_pictures(size, value):
    image = Image.new("RGB", size, (value,) * 3)
    edit = CLASSICAL["deblur+enhance+denoise"](image)
    assert edit.size == size and edit.tobytes() == image.tobytes()


def test_tasks_and_their_combinations_are_called_as_in_manifests():
    assert {*METHODS} < {*CLASSICAL}
    assert all(canonical_task(task) == task for task in CLASSICAL)
    assert not {"derain", "cartoonize", "", "derain+denoise"} & {*CLASSICAL}


def test_the_last_degradation_is_undone_first(photos):
    image = image_from_pixels01(photos[0] * 0.2)
    both = pixels01_from_image(CLASSICAL["enhance+denoise"](image))
    assert torch.equal(both, (enhance(denoise(pixels01_from_image(image))) * 255).round() / 255)
