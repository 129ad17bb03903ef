"""Full-size photographs: depth, colour profile and EXIF, read and written."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from ipx2p.errors import InputError
from ipx2p.images import load_image, pixels_u8_from_image
from ipx2p.photos import CAMERA, CAMERA_HEIGHT, CAMERA_WIDTH, ORIENTATION, Photo, read_photo

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
MAKER, TAKEN_AT, GPS = 0x010F, 0x9003, 0x8825


def exif_of(orientation, width=53, height=37):
    exif = Image.Exif()
    exif[ORIENTATION], exif[MAKER] = orientation, "a camera"
    camera = exif.get_ifd(CAMERA)
    camera |= {CAMERA_WIDTH: width, CAMERA_HEIGHT: height, TAKEN_AT: "2020:01:01 00:00:00"}
    exif.get_ifd(GPS)[1] = "N"
    return exif


def random_pixels(dtype, generator, height=37, width=53):
    high = torch.iinfo(dtype).max + 1
    return torch.randint(high, (height, width, 3), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_a_png_keeps_pixels_profile_and_exif(tmp_path, generator, dtype):
    photo = Photo(random_pixels(dtype, generator), PROFILE, exif_of(1).tobytes())
    photo.save(tmp_path / "photo.png")
    read = read_photo(tmp_path / "photo.png")
    assert read.pixels.dtype == dtype and torch.equal(read.pixels, photo.pixels)
    assert read.icc_profile == PROFILE and read.exif == photo.exif
    with Image.open(tmp_path / "photo.png") as image:  # as others read it
        image.load()
        assert image.size == (53, 37) and image.info["icc_profile"] == PROFILE
        assert image.getexif()[MAKER] == "a camera"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_a_jpeg_keeps_profile_and_exif_and_close_pixels(tmp_path, dtype):
    high = torch.iinfo(dtype).max
    ramp = torch.linspace(0, 1, 53)[None, :, None].expand(37, 53, 3)
    photo = Photo((ramp * high).round().to(dtype), PROFILE, exif_of(1).tobytes())
    photo.save(tmp_path / "photo.jpg")
    read = read_photo(tmp_path / "photo.jpg")
    assert read.icc_profile == PROFILE and read.exif == photo.exif
    assert (read.pixels01 - photo.pixels01).abs().max() < 0.02
    too_long = Photo(photo.pixels, exif=b"Exif\0\0" + bytes(70_000))
    with pytest.raises(InputError, match=r"EXIF of 70006 bytes, JPEG holds 65533: save a PNG"):
        too_long.save(tmp_path / "photo.jpg")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["u8", "rgb16", "grey16"])
def test_a_picture_is_turned_and_its_exif_says_so(tmp_path, generator, orientation, kind):
    dtype = torch.uint8 if kind == "u8" else torch.uint16
    stored, path = random_pixels(dtype, generator), tmp_path / "photo.png"
    if kind == "grey16":
        stored[..., 1:] = stored[..., :1]
        Image.fromarray(stored[..., 0].numpy()).save(path, exif=exif_of(orientation))
    else:
        Photo(stored, exif=exif_of(orientation).tobytes()).save(path)
    photo = read_photo(path)
    pixels = stored.numpy()
    turned = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(pixels),
    }[orientation]
    assert photo.pixels.dtype == dtype and np.array_equal(photo.pixels.numpy(), turned)
    exif = Image.Exif()
    exif.load(photo.exif)
    assert exif[ORIENTATION] == 1 and exif[MAKER] == "a camera" and exif.get_ifd(GPS)[1] == "N"
    camera, (height, width) = exif.get_ifd(CAMERA), turned.shape[:2]
    assert (camera[CAMERA_WIDTH], camera[CAMERA_HEIGHT]) == (width, height)
    assert camera[TAKEN_AT] == "2020:01:01 00:00:00"


def test_16_bits_are_shown_as_8(generator):
    photo = Photo(random_pixels(torch.uint16, generator), PROFILE)
    shown = np.asarray(photo.image)
    assert np.array_equal(shown, np.round(photo.pixels.numpy() / 257).astype(np.uint8))
    assert photo.image.info == {"icc_profile": PROFILE}
    assert torch.equal((photo.pixels01 * 65535).round().movedim(0, -1).int(), photo.pixels.int())


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "LA", "1"])
def test_other_modes_are_what_load_image_makes_of_them(tmp_path, mode):
    picture = Image.radial_gradient("L").resize((20, 12)).convert("RGB").convert(mode)
    path = tmp_path / ("photo.tif" if mode == "CMYK" else "photo.png")
    picture.save(path)
    assert torch.equal(read_photo(path).pixels, pixels_u8_from_image(load_image(path)))
    assert torch.equal(read_photo(picture).pixels, pixels_u8_from_image(picture))


def test_transparent_16_bit_grey_becomes_8_bits_over_white(tmp_path):
    Image.fromarray(np.full((4, 4), 500, np.uint16)).save(tmp_path / "a.png", transparency=500)
    assert torch.equal(read_photo(tmp_path / "a.png").pixels, torch.full((4, 4, 3), 255).byte())


def test_a_profile_of_other_colours_is_left_out_with_a_warning(tmp_path):
    grey = PROFILE[:16] + b"GRAY" + PROFILE[20:]
    Image.new("L", (4, 4), 9).save(tmp_path / "grey.jpg", icc_profile=grey)
    with pytest.warns(
        UserWarning, match=r"grey\.jpg: .* for 'GRAY' colours and the result is RGB"
    ) as caught:
        assert read_photo(tmp_path / "grey.jpg").icc_profile is None
    assert caught[0].filename == __file__


def test_broken_exif_counts_as_none(tmp_path):
    broken = b"Exif\0\0nonsense"
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", exif=broken)
    Image.new("I;16", (4, 4)).save(tmp_path / "b.png", exif=broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_photo(tmp_path / "a.jpg").exif is None
        assert read_photo(tmp_path / "b.png").exif is None


def test_half_a_picture_is_refused(tmp_path, generator):
    Photo(random_pixels(torch.uint16, generator)).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"half\.png: damaged picture"):
        read_photo(tmp_path / "half.png")


def test_an_opened_picture_gives_its_metadata():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "teal").save(buffer, "JPEG", exif=exif_of(6), icc_profile=PROFILE)
    photo = read_photo(Image.open(buffer))
    assert photo.pixels.shape == (8, 6, 3) and photo.icc_profile == PROFILE and photo.exif
