"""The picture loader, range conversions, geometry and saving."""

import io
import os
import random
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ipx2p import images
from ipx2p.errors import InputError
from ipx2p.images import (
    fit_size,
    image_from_pixels01,
    image_from_pixels_u8,
    image_size,
    load_image,
    load_image_bytes,
    pixels01_from_image,
    pixels01_from_pixels,
    pixels01_from_pixels_u8,
    pixels_from_pictures01,
    pixels_from_pixels01,
    pixels_u8_from_image,
    pixels_u8_from_pixels01,
    resize,
    rgb_from_image,
    save_image,
)

PHOTOS = sorted((Path(__file__).parents[1] / "assets" / "photos").glob("*.jpg"))
ORIENTATION = 0x0112


def small_rgb(width=6, height=4):
    """A picture with a different colour at every pixel."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([40 * x, 60 * y, 10 * x + 20 * y], -1).astype(np.uint8))


def smooth_rgb(width=61, height=43):
    y, x = np.mgrid[:height, :width]
    channels = [
        128 + 100 * np.sin(x / 9),
        128 + 100 * np.cos(y / 7),
        128 + 90 * np.sin((x + y) / 11),
    ]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def load_bytes(tmp_path, data, name="picture"):
    path = tmp_path / name
    path.write_bytes(data)
    return load_image(path)


def png_of_chunks(width, height, bit_depth, color_type, rows, extra=b""):
    """A PNG made by hand, for kinds that Pillow does not write. `rows`: bytes of each row."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


# Loading: memory


@pytest.mark.parametrize("strip", [1, 7, 100])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "La", "PA", "CMYK", "I;16", "I"])
def test_strips_make_the_picture_that_the_whole_makes(monkeypatch, mode, strip):
    if mode in ("I;16", "I"):
        dtype = np.uint16 if mode == "I;16" else np.int32
        image = Image.fromarray((np.arange(61 * 43).reshape(43, 61) * 20).astype(dtype))
    else:
        image = smooth_rgb().convert({"LA": "RGBA", "La": "RGBA", "PA": "P"}.get(mode, mode))
        if mode in ("RGBA", "LA", "La"):
            image.putalpha(smooth_rgb().convert("L"))
        image = image.convert("LA" if mode == "La" else mode).convert(mode)
    if mode in ("L", "P", "I;16"):
        image.info["transparency"] = 60
    whole = rgb_from_image(image)
    monkeypatch.setattr(images, "STRIP_PIXELS", 61 * strip)
    assert rgb_from_image(image).tobytes() == whole.tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16", "P"])
def test_a_large_picture_takes_no_copy_but_its_result(mode):
    image = Image.new(mode, (4000, 4000))
    if mode == "P":
        image.info["transparency"] = 0
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
    before = status_kib("VmRSS")
    rgb = rgb_from_image(image)
    assert rgb.size == image.size
    bytes_per_pixel = (status_kib("VmHWM") - before) * 1024 / 4000**2
    assert bytes_per_pixel < 6


def status_kib(name):
    (line,) = [e for e in Path("/proc/self/status").read_text().splitlines() if e.startswith(name)]
    return int(line.split()[1])


# Loading: kinds of pictures


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied_once(tmp_path, orientation, format):
    upright = smooth_rgb(24, 16)
    turn_back = {  # what a camera held that way stores
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if turn_back is None else upright.transpose(turn_back)
    if format == "TIFF":
        data = encoded(stored, format, tiffinfo={ORIENTATION: orientation})
    else:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        lossless = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
        data = encoded(stored, format, exif=exif, **lossless.get(format, {}))
    loaded = load_bytes(tmp_path, data)
    assert loaded.size == upright.size
    (tmp_path / "stored").write_bytes(data)
    assert image_size(tmp_path / "stored") == upright.size
    difference = np.abs(np.asarray(loaded, int) - np.asarray(upright, int))
    assert difference.max() <= (12 if format == "JPEG" else 0)


def test_loaded_picture_carries_no_metadata(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 1
    loaded = load_bytes(tmp_path, encoded(small_rgb(), "PNG", exif=exif, icc_profile=b"x" * 200))
    assert loaded.info == {} and len(loaded.getexif()) == 0
    assert b"iCCP" not in encoded(loaded, "PNG")


def test_alpha_is_composited_over_white(tmp_path):
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(200, 0, 0, 255), (200, 0, 0, 0), (200, 0, 0, 128)])
    loaded = load_bytes(tmp_path, encoded(rgba, "PNG"))
    assert [loaded.getpixel((x, 0)) for x in range(3)] == [
        (200, 0, 0),
        (255, 255, 255),
        (227, 127, 127),
    ]


def test_grey_with_alpha_is_composited_over_white(tmp_path):
    loaded = load_bytes(tmp_path, encoded(Image.new("LA", (2, 2), (50, 0)), "PNG"))
    assert loaded.getpixel((0, 0)) == (255, 255, 255)


def test_transparent_palette_entry_becomes_white(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    for transparency in (0, b"\x00\xff"):
        loaded = load_bytes(tmp_path, encoded(palette, "PNG", transparency=transparency))
        assert loaded.getpixel((0, 0)) == (255, 255, 255)
        assert loaded.getpixel((1, 0)) == (200, 100, 50)
    assert load_bytes(tmp_path, encoded(palette, "PNG")).getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize(
    ("mode", "color", "transparency"), [("RGB", (1, 2, 3), (1, 2, 3)), ("L", 7, 7), ("1", 0, 0)]
)
def test_transparent_color_becomes_white(tmp_path, mode, color, transparency):
    data = encoded(Image.new(mode, (2, 2), color), "PNG", transparency=transparency)
    assert load_bytes(tmp_path, data).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("LAB", (128, 128, 128), (119, 119, 119)),
    ],
)
def test_mode_is_converted_to_rgb(tmp_path, mode, color, expected):
    loaded = load_bytes(tmp_path, encoded(Image.new(mode, (3, 2), color), "TIFF"))
    assert loaded.mode == "RGB" and loaded.size == (3, 2)
    assert np.abs(np.subtract(loaded.getpixel((1, 1)), expected)).max() <= 1


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB", "CMYK", "La", "RGBa", "RGBX", "PA"])
def test_mode_in_memory_is_converted_to_rgb(mode):
    color = (204, 102, 51)  # in Pillow's own palette, for PA
    source = Image.new("RGB", (4, 4), color)
    path = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode)
    picture = source.convert(path).convert(mode) if path else source.convert(mode)
    expected = (127, 127, 127) if mode == "La" else color
    rgb = rgb_from_image(picture)
    assert rgb.mode == "RGB"
    assert np.abs(np.subtract(rgb.getpixel((0, 0)), expected)).max() <= 3


def test_cmyk_jpeg_keeps_its_colors(tmp_path):
    cmyk = Image.new("RGB", (16, 16), (220, 40, 60)).convert("CMYK")
    loaded = load_bytes(tmp_path, encoded(cmyk, "JPEG", quality=95))
    assert np.abs(np.subtract(loaded.getpixel((8, 8)), (220, 40, 60))).max() <= 3


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, format):
    values = np.array([[0, 128, 129, 257, 30000, 65535]], dtype=np.uint16)
    loaded = load_bytes(tmp_path, encoded(Image.fromarray(values), format))
    expected = np.round(values / 257)
    assert np.array_equal(np.asarray(loaded)[..., 0], expected)


def test_16_bit_grey_is_scaled_whatever_its_byte_order():
    values = np.array([[0, 257, 30000, 65535]], dtype=np.uint16)
    pictures = [
        Image.frombytes("I;16", (4, 1), values.astype("<u2").tobytes()),
        Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes()),
        Image.fromarray(values.astype(np.int32)),
    ]
    assert [picture.mode for picture in pictures] == ["I;16", "I;16B", "I"]
    for picture in pictures:
        assert np.array_equal(np.asarray(rgb_from_image(picture))[0, :, 2], [0, 1, 117, 255])


def test_transparent_16_bit_grey_becomes_white(tmp_path):
    rows = [struct.pack(">HH", 1000, 40000)]
    transparent = struct.pack(">I", 2) + b"tRNS" + struct.pack(">H", 1000)
    transparent += struct.pack(">I", zlib.crc32(transparent[4:]))
    loaded = load_bytes(tmp_path, png_of_chunks(2, 1, 16, 0, rows, transparent))
    assert [loaded.getpixel((x, 0))[0] for x in range(2)] == [255, 156]


def test_12_bit_tiff_is_scaled_to_its_own_white(tmp_path):
    entries = [
        *((256, 3, 2), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8)),
        *((277, 3, 1), (278, 3, 1), (279, 4, 3)),
    ]
    data = struct.pack("<2sHI", b"II", 42, 12) + b"\xff\xf8\x00\0"  # 4095 and 2048
    data += struct.pack("<H", len(entries))
    data += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    loaded = load_bytes(tmp_path, data + bytes(4))
    assert [loaded.getpixel((x, 0))[0] for x in range(2)] == [255, 128]


def test_16_bit_rgb_png_loads(tmp_path):
    rows = [struct.pack(">3H", 65535, 30000, 0)]
    loaded = load_bytes(tmp_path, png_of_chunks(1, 1, 16, 2, rows))
    assert np.abs(np.subtract(loaded.getpixel((0, 0)), (255, 117, 0))).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (17, 4000), (4000, 17)])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_odd_sizes_load(tmp_path, size, format):
    assert load_bytes(tmp_path, encoded(Image.new("RGB", size, "red"), format)).size == size


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_sequence_gives_its_first_frame_and_a_warning(tmp_path, format):
    frames = [Image.new("RGB", (20, 12), color) for color in ("red", "blue", "lime")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    with pytest.warns(UserWarning, match=r"picture: has 3 (frames|pages): only the first is used"):
        loaded = load_bytes(tmp_path, data)
    assert loaded.getpixel((10, 6)) == (255, 0, 0)


def test_phone_picture_with_a_preview_is_no_animation(tmp_path):
    data = encoded(smooth_rgb(), "MPO", save_all=True, append_images=[smooth_rgb(30, 20)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_bytes(tmp_path, data).size == (61, 43)


def test_bytes_are_read_as_files_are(tmp_path):
    for image in (small_rgb(), small_rgb().convert("RGBA").rotate(20), small_rgb().convert("L")):
        data = encoded(image, "PNG")
        assert load_image_bytes(data, "row 3") == load_bytes(tmp_path, data)
    with pytest.warns(UserWarning, match="row 3: has 2 frames") as caught:
        frames = encoded(
            small_rgb(), "GIF", save_all=True, append_images=[Image.new("RGB", (6, 4))]
        )
        load_image_bytes(frames, "row 3")
    assert caught[0].filename == __file__


# Loading: refusals


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"not a picture at all", "not a picture that Pillow knows"),
        (encoded(small_rgb(), "JPEG")[:-60], "damaged picture"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "a float picture"),
    ],
)
def test_bad_bytes_are_refused_with_where_they_are(data, message):
    with pytest.raises(InputError, match=rf"^row 3: {message}"):
        load_image_bytes(data, "row 3")


def test_bad_path_is_refused_with_the_path_and_the_reason(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes.png").write_text("not a picture at all")
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in [
        ("missing.png", "No such file"),
        (".", "is a folder"),
        ("empty.png", "is empty"),
        ("notes.png", "not a picture"),
        ("pipe.png", "not a regular file"),
        ("a\0b.png", "cannot be read"),
        ("x" * 300, "cannot be read"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            load_image(tmp_path / name)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_half_a_picture_is_refused(tmp_path, format):
    data = encoded(smooth_rgb(), format)
    with pytest.raises(InputError, match=r"picture: (damaged|not a) picture"):
        load_bytes(tmp_path, data[: len(data) // 2])


def test_float_picture_is_refused_with_the_fix(tmp_path):
    data = encoded(Image.new("F", (2, 2), 0.5), "TIFF")
    with pytest.raises(InputError, match=r"float picture.*range is not known.*save it as 8-bit"):
        load_bytes(tmp_path, data)


@pytest.mark.parametrize("value", [-1, 65536])
def test_integers_beyond_16_bits_are_refused(tmp_path, value):
    data = encoded(Image.new("I", (2, 2), value), "TIFF")
    with pytest.raises(InputError, match=rf"values {value}\.\.{value}, expected 0\.\.65535"):
        load_bytes(tmp_path, data)


def test_format_that_runs_another_program_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"EPS file, expected one of .*: convert it to PNG"):
        load_bytes(tmp_path, encoded(small_rgb(), "EPS"))


def test_decompression_bomb_is_refused_with_count_and_limit(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"400000000 pixels.* 178956970"):
        load_bytes(tmp_path, png_of_chunks(20000, 20000, 1, 0, [b"\0"]))
    monkeypatch.setattr(images, "MAX_PIXELS", 23)
    with pytest.raises(InputError, match=r"6 x 4 = 24 pixels, the limit is 23"):
        load_bytes(tmp_path, encoded(small_rgb(), "PNG"))


def test_large_picture_under_the_limit_does_not_warn(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)  # Pillow warns from here to the double
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_bytes(tmp_path, encoded(small_rgb(), "PNG"))


@pytest.mark.parametrize(
    "broken",
    [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0II*\0\x08\0\0\0\x09\0"],
)
def test_broken_exif_counts_as_none_and_does_not_warn(tmp_path, broken):
    for format in ("JPEG", "WEBP", "PNG"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = load_bytes(tmp_path, encoded(smooth_rgb(), format, exif=broken))
        assert loaded.size == (61, 43)


def test_damaged_files_give_a_picture_or_an_input_error(tmp_path):
    picture = smooth_rgb()
    frames = [picture.rotate(10)]
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    seeds = [
        encoded(picture, "PNG", exif=exif),
        encoded(picture.quantize(16), "PNG", transparency=3),
        encoded(picture, "PNG", save_all=True, append_images=frames),
        encoded(picture, "JPEG", exif=exif),
        encoded(picture.convert("CMYK"), "JPEG"),
        encoded(picture, "GIF", save_all=True, append_images=frames),
        encoded(picture, "WEBP", exif=exif),
        encoded(picture.convert("RGBA"), "WEBP", lossless=True),
        encoded(picture, "TIFF"),
        encoded(picture.quantize(200), "BMP"),
    ]
    rng = random.Random(0)
    refused = 0
    for seed in seeds:
        for kind in range(40):
            data = bytearray(seed)
            if kind % 2:
                data = data[: rng.randrange(1, len(data))]
            else:
                # Behind the headers, so that no file claims to be huge and takes long.
                for _ in range(rng.choice((1, 2, 8))):
                    data[rng.randrange(30, len(data))] = rng.randrange(256)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", message=".*only the first is used")
                try:
                    assert load_bytes(tmp_path, data).mode == "RGB"
                except InputError as error:
                    assert "\n" not in str(error) and str(tmp_path) in str(error)
                    refused += 1
    assert 200 < refused < 400


def test_what_is_no_pillow_picture_is_refused():
    with pytest.raises(InputError, match="expected a Pillow picture, got ndarray"):
        rgb_from_image(np.zeros((4, 4, 3)))


# Ranges


def test_every_level_survives_all_ranges():
    levels = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, 3).contiguous()
    pixels01 = pixels01_from_pixels_u8(levels)
    assert pixels01.shape == (3, 16, 16) and pixels01.min() == 0 and pixels01.max() == 1
    pixels = pixels_from_pixels01(pixels01)
    assert pixels.min() == -1 and pixels.max() == 1
    assert torch.equal(pixels_u8_from_pixels01(pixels01), levels)
    assert torch.equal(pixels_u8_from_pixels01(pixels01_from_pixels(pixels)), levels)
    assert torch.equal(pixels_u8_from_pixels01(pixels01.double()), levels)


def test_picture_survives_the_way_to_pixels01_and_back():
    picture = small_rgb()
    pixels01 = pixels01_from_image(picture)
    assert pixels01.shape == (3, 4, 6) and pixels01.dtype == torch.float32
    assert pixels01[0, 0, 2].item() == pytest.approx(80 / 255)  # channel 0, y = 0, x = 2
    assert image_from_pixels01(pixels01).tobytes() == picture.tobytes()
    assert pixels_u8_from_image(picture).shape == (4, 6, 3)
    assert image_from_pixels_u8(pixels_u8_from_image(picture)).tobytes() == picture.tobytes()


def test_batches_convert_like_their_pictures():
    batch = torch.randint(0, 256, (2, 5, 7, 3), generator=torch.Generator().manual_seed(0)).byte()
    pixels01 = pixels01_from_pixels_u8(batch)
    assert pixels01.shape == (2, 3, 5, 7)
    assert torch.equal(pixels01[1], pixels01_from_pixels_u8(batch[1]))
    assert torch.equal(pixels_u8_from_pixels01(pixels01), batch)


def test_to_u8_rounds_to_nearest_after_clamping():
    values = torch.tensor([-0.5, 0.49 / 255, 0.51 / 255, 254.6 / 255, 1.0, 3.0]).view(1, 1, 6)
    levels = pixels_u8_from_pixels01(values.expand(3, 1, 6))
    assert levels[0, :, 0].tolist() == [0, 0, 1, 255, 255, 255]


def test_overshoot_of_a_decoder_is_clamped():
    pixels = torch.tensor([-1.2, 0.0, 1.2]).view(1, 1, 3).expand(3, 1, 3)
    assert pixels01_from_pixels(pixels)[0, 0].tolist() == [0, 0.5, 1]


def test_several_pictures_become_the_batch_that_each_becomes(generator):
    pictures = [torch.rand(3, 5, 7, generator=generator) for _ in range(3)]
    batch = pixels_from_pictures01(pictures)
    assert torch.equal(batch, torch.stack([pixels_from_pixels01(one) for one in pictures]))
    with pytest.raises(InputError, match=r"expected values in \[0, 1\], got 0\.\.255"):
        pixels_from_pictures01([pictures[0], torch.linspace(0, 255, 105).view(3, 5, 7)])
    with pytest.raises(InputError, match="1 of 105 are NaN"):
        pixels_from_pictures01([pictures[0], spoiled(pictures[1])])


def spoiled(pixels):
    """The same with one NaN."""
    return pixels.clone().index_put_((torch.tensor(0),) * 3, torch.tensor(float("nan")))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "convert",
    [image_from_pixels01, pixels_u8_from_pixels01, pixels_from_pixels01, pixels01_from_pixels],
)
def test_values_that_are_not_finite_are_refused(convert, value):
    values = torch.zeros(3, 4, 4)
    values[1, 2, 3] = value
    with pytest.raises(InputError, match="expected finite values, 1 of 48 are NaN"):
        convert(values)


@pytest.mark.parametrize("value", [-0.01, 1.01, 255.0])
def test_pixels01_of_another_range_are_refused(value):
    with pytest.raises(InputError, match=r"expected values in \[0, 1\]"):
        pixels_from_pixels01(torch.full((3, 4, 4), value))


@pytest.mark.parametrize(
    ("convert", "tensor"),
    [
        (pixels01_from_pixels_u8, torch.zeros(3, 4, 4, dtype=torch.uint8)),
        (pixels01_from_pixels_u8, torch.zeros(4, 4, 3)),
        (image_from_pixels_u8, torch.zeros(1, 4, 4, 3, dtype=torch.uint8)),
        (pixels_u8_from_pixels01, torch.zeros(4, 4, 3)),
        (pixels_u8_from_pixels01, torch.zeros(3, 4, 4, dtype=torch.int64)),
        (pixels_from_pixels01, torch.zeros(1, 4, 4)),
        (pixels01_from_pixels, torch.zeros(3, 0, 4)),
        (image_from_pixels01, torch.zeros(1, 3, 4, 4)),
    ],
)
def test_other_layouts_and_dtypes_are_refused(convert, tensor):
    with pytest.raises(InputError, match=r"expected pixels.*, got \w+ \("):
        convert(tensor)


def test_conversions_leave_their_argument_alone():
    values = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    before = values.clone()
    pixels_from_pixels01(values)
    pixels01_from_pixels(values)
    pixels_u8_from_pixels01(values)
    assert torch.equal(values, before)


# Geometry


@pytest.mark.parametrize(
    ("width", "height", "resolution", "multiple", "expected"),
    [
        (640, 480, 512, 8, (512, 384)),
        (480, 640, 512, 64, (384, 512)),
        (1000, 667, 512, 8, (512, 344)),  # 341.5 is nearer to 344 than to 336
        (500, 333, None, 8, (504, 336)),  # 500 lies in the middle: up
        (499, 333, None, 8, (496, 336)),
        (17, 4000, 512, 8, (8, 512)),  # never less than one multiple
        (1, 1, None, 8, (8, 8)),
        (1, 1, 64, 8, (64, 64)),
        (512, 512, 500, 8, (504, 504)),
        (300, 200, 450, 1, (450, 300)),
    ],
)
def test_fit_size(width, height, resolution, multiple, expected):
    assert fit_size(width, height, resolution, multiple) == expected


@pytest.mark.parametrize("bad", [(0, 5, None, 8), (5, -1, None, 8), (5, 5, 0, 8), (5, 5, None, 0)])
def test_fit_size_refuses_what_is_not_positive(bad):
    with pytest.raises(InputError, match="must be at least 1"):
        fit_size(*bad)


@pytest.mark.parametrize("size", [(3, 2), (12, 8), (3, 8), (6, 4)])
def test_resize_gives_exactly_the_size(size):
    assert resize(small_rgb(), size).size == size


def test_resize_shrinks_without_aliasing():
    checks = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    small = np.asarray(resize(checks, (16, 16)), int)
    assert np.abs(small - 127).max() <= 3


# Saving


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG"])
def test_saved_picture_loads_again(tmp_path, name):
    picture = smooth_rgb()
    save_image(picture, tmp_path / name)
    loaded = load_image(tmp_path / name)
    difference = np.abs(np.asarray(loaded, int) - np.asarray(picture, int)).max()
    assert difference <= (0 if name.endswith("png") else 8)
    assert os.listdir(tmp_path) == [name]


def test_failed_save_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"old")
    with pytest.raises(InputError, match=r"cannot write .*a\.jpg: cannot write mode RGBA"):
        save_image(Image.new("RGBA", (4, 4)), path)  # JPEG has no alpha
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.jpg"]


def test_saving_to_a_bad_path_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for name, message in [
        ("a.gif", r"cannot save as '\.gif': use \.png"),
        ("file/a.png", "choose another place"),
        ("a\0.png", "null"),
    ]:
        with pytest.raises(InputError, match=message):
            save_image(small_rgb(), tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        save_image(small_rgb(), tmp_path / "folder.png")


# The photographs of the repository


def test_photographs_are_small_clean_and_listed():
    readme = (PHOTOS[0].parent / "README.md").read_text()
    assert len(PHOTOS) == 21
    for path in PHOTOS:
        with Image.open(path) as picture:
            assert picture.format == "JPEG" and picture.mode == "RGB"
            assert 384 <= max(picture.size) <= 512
            assert not {"exif", "icc_profile", "comment", "xmp"} & picture.info.keys()
        assert path.stat().st_size <= 60_000
        assert f"`{path.name}`" in readme
    assert readme.count(".jpg` |") >= len(PHOTOS)
