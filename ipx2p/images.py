"""Pictures: the one loader, range conversions, geometry, saving (layer 0).

Every input becomes an 8-bit RGB picture, or an error that says why it cannot. Between Pillow and
tensors the range of the values is part of every function's name:
    image      a Pillow picture
    pixels_u8  uint8 in 0..255, (H, W, 3)
    pixels01   float in [0, 1], (3, H, W); most functions also take a batch (N, 3, H, W)
    pixels     float in [-1, 1], shaped like pixels01
Picture sizes are (width, height), as in Pillow. Colour profiles are not applied.
"""

import contextlib
import io
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ipx2p.errors import InputError
from ipx2p.files import atomic_write, check_picture_file

MAX_PIXELS = 178_956_970  # more is treated as a decompression bomb; Pillow's own limit for an error
STRIP_PIXELS = 2**20  # of a picture that is converted strip by strip
# Formats that Pillow decodes itself; EPS, for example, would start another program.
FORMATS = "AVIF, BMP, DIB, GIF, JPEG, JPEG2000, MPO, PCX, PNG, PPM, TGA, TIFF, WEBP"
SEQUENCES = {"AVIF": "frames", "GIF": "frames", "PNG": "frames", "TIFF": "pages", "WEBP": "frames"}
_JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}
SAVE_OPTIONS = {".png": {"format": "PNG"}, ".jpg": _JPEG, ".jpeg": _JPEG}
MAX_JPEG_EXIF = 65_533  # bytes
RANGE_TOLERANCE = 1e-6  # how far a pixels01 value may leave [0, 1]: rounding, not another range

_ORIENTATION = 0x0112  # the EXIF tag, and what undoes each of its values
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262


def load_image(path: str | os.PathLike) -> Image.Image:
    """Read a picture file as an upright, opaque, 8-bit RGB picture without metadata.

    EXIF rotation is applied (an unreadable EXIF block counts as none), transparency is composited
    over white, 16-bit grey is scaled to 8 bits. Of an animation or a document of several pages the
    first is used, with a warning.
    Raises: InputError if the file is not a picture, is damaged, has more than `MAX_PIXELS`
        pixels, or has values whose range is not known (floats, 32-bit integers beyond 16 bits).
    """
    path = Path(path)
    check_picture_file(path)
    with _decoding(path), open(path, "rb") as file:
        return _load(file, path)


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """Width and height of what `load_image` gives; most formats need not be decoded for it.

    Raises: InputError if the file's header shows that it is not such a picture.
    """
    path = Path(path)
    check_picture_file(path)
    with _decoding(path), open(path, "rb") as file, Image.open(file) as image:
        _check_head(image)
        if image.format == "TIFF":  # Pillow turns it as it decodes it
            image.load()
        width, height = image.size
        turned = _orientation(image) in _UPRIGHT and _orientation(image) >= 5
    return (height, width) if turned else (width, height)


def load_image_bytes(data: bytes, where: str) -> Image.Image:
    """Read an encoded picture by the rules of `load_image`; `where` names it in errors."""
    if not data:
        raise InputError(f"{where}: is empty (0 bytes), expected a picture: fetch it again")
    with _decoding(where), io.BytesIO(data) as file:
        return _load(file, where)


def rgb_from_image(image: Image.Image) -> Image.Image:
    """Any picture that Pillow opened, by the rules of `load_image`: upright, opaque, 8-bit RGB."""
    if not isinstance(image, Image.Image):
        raise InputError(f"expected a Pillow picture, got {type(image).__name__}: use load_image")
    with _decoding("picture"):
        return _upright_rgb(image)


@contextlib.contextmanager
def _decoding(where: object) -> Iterator[None]:
    """Turn any exception of Pillow's into an InputError about `where`, and silence its warnings.

    On damaged files Pillow raises OSError, SyntaxError, ValueError, EOFError, struct.error,
    KeyError, MemoryError and more; no list of them is complete. The filter names Pillow only, since
    until Python 3.14 threads that enter and leave `catch_warnings` in turn may leave it behind.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\b")
            yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except Image.DecompressionBombError as error:  # its text has the pixel count and the limit
        raise InputError(f"{where}: {_reason(error)} Make the picture smaller") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{where}: not a picture that Pillow knows, or its first bytes are damaged: "
            "expected PNG, JPEG, WebP, GIF, TIFF or BMP"
        ) from error
    except Exception as error:
        found = "cannot be read" if getattr(error, "errno", None) else "damaged picture"
        raise InputError(f"{where}: {found} ({_reason(error)}): replace the file") from error


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def _load(file: BinaryIO, where: object) -> Image.Image:
    with Image.open(file) as image:
        _check_head(image)
        sequence = SEQUENCES.get(image.format)
        num_frames = getattr(image, "n_frames", 1) if sequence else 1
        loaded = _upright_rgb(image)
    if num_frames > 1:  # the warning is about the caller of load_image or load_image_bytes
        warnings.warn(f"{where}: has {num_frames} {sequence}: only the first is used", stacklevel=3)
    return loaded


def _check_head(image: Image.Image) -> None:
    if image.format not in FORMATS.split(", "):
        raise InputError(f"{image.format} file, expected one of {FORMATS}: convert it to PNG")
    if (num_pixels := image.width * image.height) > MAX_PIXELS:
        size = f"{image.width} x {image.height} = {num_pixels} pixels"
        raise InputError(f"{size}, the limit is {MAX_PIXELS}: make it smaller")


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # a broken EXIF block raises errors of many kinds
        return None


def upright(image: Image.Image) -> Image.Image:
    """A picture in its own mode, decoded and turned; for one that is not a TIFF."""
    image.load()
    orientation = _orientation(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _upright_rgb(image: Image.Image) -> Image.Image:
    """The picture, decoded, turned and converted; a copy without metadata.

    A large picture takes at most 8 bytes of memory per pixel, 12 if it is turned and not RGB.
    """
    image.load()
    orientation = _orientation(image)
    is_plain = image.mode == "RGB" and not image.has_transparency_data
    rgb = image if is_plain else _opaque_rgb(image)
    rgb = rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb
    rgb = image.copy() if rgb is image else rgb
    rgb.info = {}
    return rgb


def _opaque_rgb(image: Image.Image) -> Image.Image:
    """The picture over white, converted strip by strip."""
    rgb = Image.new("RGB", image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        rgb.paste(_opaque_strip(image.crop(box), getattr(image, "tag_v2", {})), box)
    return rgb


def _opaque_strip(strip: Image.Image, tags: Mapping[int, object]) -> Image.Image:
    if strip.mode == "F":
        raise InputError(
            "a float picture (mode F), expected 8 or 16 bits a channel: its range is not known, "
            "scale it to 0..255 and save it as 8-bit PNG"
        )
    if strip.mode == "I" or strip.mode.startswith("I;16"):
        return _grey8_from_grey16(strip, tags)
    if not strip.has_transparency_data:
        return strip.convert("RGB")
    if strip.mode == "La":  # premultiplied; Pillow has no direct way to RGBA
        strip = strip.convert("LA")
    white = Image.new("RGBA", strip.size, "white")
    return Image.alpha_composite(white, strip.convert("RGBA")).convert("RGB")


def _grey8_from_grey16(strip: Image.Image, tags: Mapping[int, object]) -> Image.Image:
    """Of a TIFF (the one with tags) 12 bits come as they are, and so do negatives."""
    values = np.asarray(strip.convert("I"), dtype=np.int32)  # (H, W)
    if values.min() < 0 or values.max() > 65535:
        raise InputError(
            f"an integer picture with values {values.min()}..{values.max()}, expected 0..65535: "
            "its range is not known, scale it and save it as 16-bit PNG"
        )
    white = 4095 if tags.get(_TIFF_BITS) == (12,) else 65535
    if tags.get(_TIFF_PHOTOMETRIC) == 0:
        values = white - values
    grey = (values * 255 + white // 2) // white
    if "transparency" in strip.info:  # one grey value is transparent
        grey[values == strip.info["transparency"]] = 255
    return Image.fromarray(grey.astype(np.uint8))


def pixels_u8_from_image(image: Image.Image) -> Tensor:
    """A picture of any mode (see `rgb_from_image`) -> uint8, (H, W, 3)."""
    return torch.from_numpy(np.array(rgb_from_image(image)))


def image_from_pixels_u8(pixels_u8: Tensor) -> Image.Image:
    """uint8, (H, W, 3) -> RGB picture."""
    ok = pixels_u8.dtype == torch.uint8 and pixels_u8.ndim == 3 and pixels_u8.shape[-1] == 3
    _expect(ok, "pixels_u8, uint8 (H, W, 3)", pixels_u8)
    return Image.fromarray(pixels_u8.cpu().numpy())


def pixels01_from_pixels_u8(pixels_u8: Tensor) -> Tensor:
    """uint8, ([N,] H, W, 3) -> float32 in [0, 1], ([N,] 3, H, W)."""
    ok = pixels_u8.dtype == torch.uint8 and pixels_u8.ndim in (3, 4) and pixels_u8.shape[-1] == 3
    _expect(ok, "pixels_u8, uint8 ([N,] H, W, 3)", pixels_u8)
    return pixels_u8.movedim(-1, -3).contiguous().float().div_(255)


def pixels_u8_from_pixels01(pixels01: Tensor) -> Tensor:
    """float, ([N,] 3, H, W) -> uint8, ([N,] H, W, 3): clamped to [0, 1], rounded to nearest."""
    _check_finite_float("pixels01", pixels01)
    levels = (pixels01.float().clamp(0, 1) * 255).round()
    return levels.to(torch.uint8).movedim(-3, -1).contiguous()


def pixels01_from_image(image: Image.Image) -> Tensor:
    """A picture of any mode (see `rgb_from_image`) -> float32 in [0, 1], (3, H, W)."""
    return pixels01_from_pixels_u8(pixels_u8_from_image(image))


def image_from_pixels01(pixels01: Tensor) -> Image.Image:
    """float, (3, H, W) -> RGB picture: clamped to [0, 1], rounded to nearest."""
    _expect(pixels01.ndim == 3, "pixels01 of one picture, float (3, H, W)", pixels01)
    return image_from_pixels_u8(pixels_u8_from_pixels01(pixels01))


def pixels_from_pixels01(pixels01: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1], in the dtype given. Values of another range are refused."""
    _check_range(pixels01)
    return pixels01 * 2 - 1


def pixels_from_pictures01(pictures01: Sequence[Tensor]) -> Tensor:
    """`pixels_from_pixels01` of float32 pictures of one size, (3, H, W) each -> (N, 3, H, W).

    One pass over each: half the time that it takes after `torch.stack`.
    """
    pixels = torch.empty(len(pictures01), *pictures01[0].shape)
    minus_one = torch.tensor(-1.0)
    for place, pixels01 in enumerate(pictures01):
        _check_range(pixels01)
        torch.add(minus_one, pixels01, alpha=2, out=pixels[place])
    return pixels


def pixels01_from_pixels(pixels: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], in the dtype given. Clamped: a decoder overshoots its range a little."""
    _check_finite_float("pixels", pixels)
    return ((pixels + 1) / 2).clamp(0, 1)


def _check_range(pixels01: Tensor) -> None:
    low, high = _check_finite_float("pixels01", pixels01)
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise InputError(
            f"pixels01: expected values in [0, 1], got {low:.6g}..{high:.6g}: "
            "convert with pixels01_from_pixels ([-1, 1]) or pixels01_from_pixels_u8 (0..255)"
        )


def _check_finite_float(name: str, pixels: Tensor) -> tuple[float, float]:
    """The least and the largest value. Waits for the device: not for use inside a step."""
    ok = pixels.is_floating_point() and pixels.ndim in (3, 4) and pixels.shape[-3] == 3
    _expect(ok and pixels.numel() > 0, f"{name}, float ([N,] 3, H, W)", pixels)
    low, high = torch.stack(pixels.aminmax()).tolist()  # NaN if there is one anywhere
    if not -math.inf < low <= high < math.inf:
        num_bad = int((~pixels.isfinite()).sum())
        raise InputError(
            f"{name}: expected finite values, {num_bad} of {pixels.numel()} are NaN or infinite: "
            "find the step that produced them"
        )
    return low, high


def _expect(ok: bool, expected: str, found: Tensor) -> None:
    if not ok:
        dtype = str(found.dtype).removeprefix("torch.")
        raise InputError(f"expected {expected}, got {dtype} {tuple(found.shape)}")


def fit_size(width: int, height: int, resolution: int | None, multiple: int) -> tuple[int, int]:
    """The size to work at: the long side becomes `resolution`, each side a multiple of `multiple`.

    Each side is rounded to the nearest multiple (a tie goes up) and is at least one; the aspect
    ratio may change by that much. Without a resolution the picture's own size is rounded so.
    Returns: (width, height).
    """
    for name, value in (("width", width), ("height", height), ("multiple", multiple)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if resolution is not None and resolution < 1:
        raise InputError(f"resolution must be at least 1, or None, got {resolution}")
    long_side = max(width, height)
    target = long_side if resolution is None else resolution

    def round_side(side: int) -> int:  # in integers: side * target / long_side, rounded
        count = (2 * side * target + long_side * multiple) // (2 * long_side * multiple)
        return max(1, count) * multiple

    return round_side(width), round_side(height)


def resize(
    image: Image.Image,
    size: tuple[int, int],
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """A picture, or a box (left, top, right, bottom) of it, to exactly (width, height).

    Bicubic if no side shrinks, Lanczos otherwise.
    """
    if min(size) < 1:
        raise InputError(f"size must be at least 1 x 1, got {size[0]} x {size[1]}")
    if size[0] * size[1] > MAX_PIXELS:
        raise InputError(
            f"a picture of {size[0]} x {size[1]} pixels was asked for, the limit is {MAX_PIXELS}: "
            "choose a smaller resolution"
        )
    left, top, right, bottom = box or (0, 0, *image.size)
    grows = size[0] >= right - left and size[1] >= bottom - top
    resampling = Image.Resampling.BICUBIC if grows else Image.Resampling.LANCZOS
    return image.resize(size, resampling, box=box)


def fit(image: Image.Image, resolution: int | None, multiple: int) -> Image.Image:
    """A picture of any mode, upright RGB, at the size of `fit_size`."""
    image = rgb_from_image(image)
    return resize(image, fit_size(*image.size, resolution, multiple))


def save_image(image: Image.Image, path: str | os.PathLike, **more: bytes | int) -> None:
    """Write a PNG or JPEG (by the suffix) so that `path` holds the whole file or the old one.

    JPEG: quality 95, full colour resolution. The folder is made as needed.
    more: options of Pillow's, as `icc_profile`, `exif` and `compress_level`.
    Raises: InputError with the reason if it cannot be written.
    """
    path = Path(path)
    options = SAVE_OPTIONS.get(path.suffix.lower())
    if options is None:
        raise InputError(f"{path}: cannot save as {path.suffix!r}: use {', '.join(SAVE_OPTIONS)}")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected the name of a file to write")
    if options is _JPEG and (size := len(more.get("exif", b""))) > MAX_JPEG_EXIF:
        raise InputError(f"{path}: EXIF of {size} bytes, JPEG holds {MAX_JPEG_EXIF}: save a PNG")
    with atomic_write(path) as temporary:
        image.save(temporary, **options, **more)
