"""Transfers of an edit from a small copy to the full-size original."""

import pytest
import torch
from PIL import Image

from ipx2p import transfer
from ipx2p.errors import InputError
from ipx2p.images import image_from_pixels01, pixels01_from_image, pixels_u8_from_image
from ipx2p.transfer import TRANSFERS, affine, carry_over, enlarging

MATRIX = torch.tensor([[0.6, 0.2, 0.0], [0.1, 0.7, 0.1], [0.0, 0.3, 0.5]])
OFFSET = torch.tensor([0.1, 0.05, 0.0])


def mapped(pixels01, matrix=MATRIX, offset=OFFSET):
    """The same affine function of every pixel, (3, H, W)."""
    return torch.einsum("ij,jhw->ihw", matrix, pixels01) + offset[:, None, None]


def photograph(generator, height=60, width=84, scale=5):
    """Smooth colours with detail: the original, uint8, and its small copy in [0, 1]."""
    coarse = torch.rand(1, 3, height // 6, width // 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    detail = 0.08 * torch.randn(3, height, width, generator=generator)
    large = torch.nn.functional.interpolate(smooth[None], scale_factor=scale, mode="bicubic")[0]
    fine = 0.05 * torch.randn(large.shape, generator=generator)
    large = large + torch.nn.functional.interpolate(detail[None], scale_factor=scale)[0] + fine
    original = pixels_u8_from_image(image_from_pixels01(large))
    small = image_from_pixels01(original.movedim(-1, 0) / 255).resize((width, height), 1)
    return original, pixels01_from_image(small)


def pixels01(original):
    return original.movedim(-1, 0) / 255


def error(result, expected01):
    """The root mean square difference from what is expected, in [0, 1] units."""
    return (pixels01(result) - expected01.clamp(0, 1)).square().mean().sqrt().item()


@pytest.mark.parametrize("name", [name for name in TRANSFERS if name != "upscale"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("size", [(101, 67), (40, 333), (8, 5), (1, 1)])
def test_without_an_edit_the_original_comes_back_bit_for_bit(name, dtype, size, generator):
    high = torch.iinfo(dtype).max + 1
    original = torch.randint(high, (*size, 3), generator=generator).to(dtype)
    source = torch.rand(3, 24, 16, generator=generator)
    assert torch.equal(carry_over(original, source, source, name), original)
    flat = torch.full_like(source, 0.5)  # in which there is nothing to fit
    assert torch.equal(carry_over(original, flat, flat, name), original)


def test_upscale_gives_what_bicubic_enlarging_gives(generator):
    original, source = photograph(generator)
    small = image_from_pixels01(source)
    expected = small.resize(original.shape[1::-1], Image.Resampling.BICUBIC)
    got = carry_over(original, source, source, "upscale")
    difference = got.int() - pixels_u8_from_image(expected).int()
    inside = difference[10:-10, 10:-10]  # Pillow rounds twice, and takes fewer pixels at its border
    assert inside.abs().max() <= 2


def test_affine_reproduces_any_affine_edit_as_its_ridge_vanishes(generator, monkeypatch):
    original, source = photograph(generator)
    monkeypatch.setattr(transfer, "LEAST_RIDGE", 0.0)
    errors = []
    for eps in (1e-1, 1e-3, 1e-5, 1e-7):
        monkeypatch.setattr(transfer, "EPS", eps)
        result = carry_over(original, source, mapped(source), "affine")
        errors.append(error(result, mapped(pixels01(original))))
    assert errors == sorted(errors, reverse=True)
    levels = (mapped(pixels01(original)) * 255).round()
    assert (result.movedim(-1, 0) - levels).abs().max() <= 1


def test_a_dark_picture_is_fitted_like_a_bright_one(generator, monkeypatch):
    monkeypatch.setattr(transfer, "LEAST_RIDGE", 0.0)
    source = torch.rand(3, 24, 16, generator=generator).double()
    edited = source + torch.rand(3, 24, 16, generator=generator)
    bright, dark = affine(source, edited), affine(source / 8, edited / 8)
    torch.testing.assert_close(dark.matrix, bright.matrix)


def test_colours_of_little_contrast_grow_with_the_light(generator):
    light = torch.rand(1, 24, 16, generator=generator) * 0.2
    source = (light + 0.004 * torch.randn(3, 24, 16, generator=generator)).double()
    matrix = affine(source, 4 * source).matrix  # M is 3 for all colours, not for light alone
    torch.testing.assert_close(matrix.mean((2, 3)), 3 * torch.eye(3).double(), atol=0.2, rtol=0)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("affine", lambda p: p * 0.7 + 0.1),
        ("residual", lambda p: p + 0.1),
        ("ratio", lambda p: (p + transfer.DARK) * 0.7 - transfer.DARK),
    ],
)
def test_each_transfer_is_exact_for_its_own_kind_of_edit(name, edit, generator, monkeypatch):
    monkeypatch.setattr(transfer, "EPS", 1e-7)
    original, source = photograph(generator)
    got = carry_over(original, source, edit(source), name)
    expected = (edit(pixels01(original)).clamp(0, 1) * 255).round()
    assert (got.movedim(-1, 0) - expected).abs().max() <= 1


def test_auto_is_affine_for_a_change_of_tone(generator):
    original, source = photograph(generator)
    errors = {
        name: error(
            carry_over(original, source, mapped(source).clamp(0, 1) ** 0.9, name),
            mapped(pixels01(original)).clamp(0, 1) ** 0.9,
        )
        for name in TRANSFERS
    }
    assert errors["auto"] < 1.1 * errors["affine"] < 0.5 * errors["residual"]


def test_auto_carries_new_content_better_than_affine_and_no_worse_than_residual(generator):
    original, source = photograph(generator)

    def pasted(pixels):  # a third of the picture is another part of it
        result, (height, width) = pixels.clone(), pixels.shape[-2:]
        inside = (..., slice(height // 3, 2 * height // 3), slice(width // 3, 2 * width // 3))
        result[inside] = pixels[..., : height // 3, : width // 3].flip(-1)
        return result

    expected = pasted(pixels01(original))
    errors = {
        name: error(carry_over(original, source, pasted(source), name), expected)
        for name in TRANSFERS
    }
    assert errors["auto"] < 0.95 * errors["affine"]
    assert errors["auto"] < 1.02 * errors["residual"]


@pytest.mark.parametrize("name", TRANSFERS)
@pytest.mark.parametrize("strip_rows", [1, 7, 64])
def test_there_are_no_seams_between_strips(name, strip_rows, generator):
    original, source = photograph(generator)
    edited = torch.rand(source.shape, generator=generator)
    whole = carry_over(original, source, edited, name, strip_rows=len(original))
    strips = carry_over(original, source, edited, name, strip_rows=strip_rows)
    difference = (whole.int() - strips.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-4  # float rounding


def test_the_original_is_not_changed(generator):
    original, source = photograph(generator)
    before = original.clone()
    carry_over(original, source, 1 - source, "auto")
    assert torch.equal(original, before)


@pytest.mark.parametrize(("size", "full_size"), [(4, 30), (16, 333), (5, 5), (9, 4), (1, 7)])
def test_enlarging_keeps_constants_and_straight_lines(size, full_size):
    matrix = enlarging(size, full_size)
    torch.testing.assert_close(matrix.sum(1), torch.ones(full_size))
    place = (torch.arange(full_size) + 0.5) * size / full_size - 0.5
    inside = (place >= 1) & (place <= size - 2)
    torch.testing.assert_close((matrix @ torch.arange(size).float())[inside], place[inside])


def test_what_cannot_be_carried_gets_one_line():
    original, small = torch.zeros(4, 4, 3, dtype=torch.uint8), torch.zeros(3, 2, 2)
    with pytest.raises(InputError, match="unknown transfer 'afine'; did you mean affine"):
        carry_over(original, small, small, "afine")
    with pytest.raises(InputError, match=r"shapes \(3, 2, 2\) and \(3, 2, 3\), expected"):
        carry_over(original, small, torch.zeros(3, 2, 3), "affine")
