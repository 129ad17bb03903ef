"""Photographs at full size: 8 or 16 bits, colour profile and EXIF, read and written (layer 0).

`images` gives every picture as 8-bit RGB without metadata, as models need it. A `Photo` keeps what
a person wants back: the depth of a 16-bit PNG (grey or RGB), the ICC profile, and EXIF. As there,
the picture is upright and opaque, and its colours are RGB. Lost are transparency, the depth of
other 16-bit files, previews, XMP and comments, and a profile of grey or CMYK colours.
"""

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ipx2p.files import atomic_write
from ipx2p.images import (
    image_from_pixels_u8,
    load_image,
    pixels_u8_from_image,
    save_image,
    upright,
)

ORIENTATION = 0x0112  # EXIF tags; the next ones are in the sub-directory CAMERA
CAMERA, CAMERA_WIDTH, CAMERA_HEIGHT = 0x8769, 0xA002, 0xA003
STRIP_ROWS = 64  # that are compressed at once
ZLIB_LEVEL = 3  # of PNG: a tenth larger than with 6, in a third of the time


@dataclass(frozen=True)
class Photo:
    """An upright RGB picture: pixels (H, W, 3), uint8 or uint16, and its metadata, if any.

    exif: as files hold it, from `Exif` on; its orientation is 1.
    """

    pixels: Tensor
    icc_profile: bytes | None = None
    exif: bytes | None = None

    @property
    def white(self) -> int:
        """The largest value: 255 or 65535."""
        return torch.iinfo(self.pixels.dtype).max

    @property
    def image(self) -> Image.Image:
        """An 8-bit Pillow picture, with the metadata in its `info`."""
        pixels = self.pixels
        if self.white > 255:
            pixels = ((pixels.int() + 128) // 257).to(torch.uint8)  # v / 257, rounded
        image = image_from_pixels_u8(pixels)
        image.info |= self._metadata()
        return image

    @property
    def pixels01(self) -> Tensor:
        """float32 in [0, 1], (3, H, W)."""
        return self.pixels.movedim(-1, 0).contiguous().float().div_(self.white)

    def save(self, path: str | os.PathLike) -> None:
        """Write a PNG (16 bits stay 16 bits) or a JPEG (8 bits), as `save_image` does."""
        path = Path(path)
        if self.white == 255 or path.suffix.lower() != ".png":
            save_image(self.image, path, compress_level=ZLIB_LEVEL, **self._metadata())
            return
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            file.writelines(self._png16())

    def _metadata(self) -> dict[str, bytes]:
        both = {"icc_profile": self.icc_profile, "exif": self.exif}
        return {name: data for name, data in both.items() if data}

    def _png16(self) -> Iterator[bytes]:
        """The bytes of a 16-bit RGB PNG (ISO/IEC 15948), which Pillow cannot write."""
        height, width = self.pixels.shape[:2]
        yield b"\x89PNG\r\n\x1a\n"
        yield _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
        if self.icc_profile:
            yield _chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(self.icc_profile))
        if self.exif:
            yield _chunk(b"eXIf", self.exif.removeprefix(b"Exif\0\0"))
        packer = zlib.compressobj(ZLIB_LEVEL)
        for top in range(0, height, STRIP_ROWS):
            strip = self.pixels[top : top + STRIP_ROWS].numpy().astype(">u2")
            rows = strip.view(np.uint8).reshape(len(strip), -1)
            filtered = np.ones((len(rows), 1 + rows.shape[1]), np.uint8)  # filter 1: from the left
            filtered[:, 1:7] = rows[:, :6]
            np.subtract(rows[:, 6:], rows[:, :-6], out=filtered[:, 7:])
            if data := packer.compress(filtered):
                yield _chunk(b"IDAT", data)
        yield _chunk(b"IDAT", packer.flush())
        yield _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def read_photo(source: str | os.PathLike | Image.Image) -> Photo:
    """Read a picture file at its full size and depth; or take a Pillow picture, as 8 bits.

    Raises: InputError for what `load_image` refuses.
    """
    if isinstance(source, Image.Image):
        pixels, exif = pixels_u8_from_image(source), _upright_exif(source)
        return Photo(pixels, _rgb_profile(source, "picture"), exif)
    pixels = pixels_u8_from_image(load_image(source))
    with warnings.catch_warnings(), Image.open(source) as image:
        warnings.simplefilter("ignore")  # `load_image` has said what there is to say
        if image.format == "PNG" and not image.has_transparency_data:
            pixels = _deeper(pixels, image)
        exif = _upright_exif(image)
    return Photo(pixels, _rgb_profile(image, source), exif)


def _deeper(pixels_u8: Tensor, image: Image.Image) -> Tensor:
    """The pixels of an opened PNG as uint16 if it has 16 bits, else those that are given."""
    if image.mode == "I;16":
        grey = np.array(upright(image))  # (H, W)
        return torch.from_numpy(grey)[..., None].repeat(1, 1, 3)
    decoder, *where, layout = image.tile[0]
    if layout != "RGB;16B":
        return pixels_u8
    # Of two bytes Pillow reads the high one. With their order swapped, it reads the low one.
    image.tile = [(decoder, *where, "RGB;16L")]
    low = pixels_u8_from_image(image)
    return torch.from_numpy(pixels_u8.numpy().astype(np.uint16) << 8 | low.numpy())


def _rgb_profile(image: Image.Image, where: object) -> bytes | None:
    profile = image.info.get("icc_profile") or None
    if profile and profile[16:20] != b"RGB ":  # the colour space in its header
        kind = profile[16:20].decode("ascii", "replace").strip()
        fault = f"its colour profile is for {kind!r} colours and the result is RGB"
        warnings.warn(f"{where}: {fault}: it is left out", stacklevel=3)
        return None
    return profile


def _upright_exif(image: Image.Image) -> bytes | None:
    """The EXIF block for the picture once it is upright; None if there is none, or it is broken."""
    try:
        exif = image.getexif()
        if not exif:
            return None
        is_turned = exif.get(ORIENTATION, 1) >= 5
        if ORIENTATION in exif:
            exif[ORIENTATION] = 1
        camera = exif.get_ifd(CAMERA)
        if is_turned and {CAMERA_WIDTH, CAMERA_HEIGHT} <= camera.keys():
            sides = camera[CAMERA_HEIGHT], camera[CAMERA_WIDTH]
            camera[CAMERA_WIDTH], camera[CAMERA_HEIGHT] = sides
        return exif.tobytes()
    except Exception:  # a broken block raises errors of many kinds; `load_image` takes it for none
        return None
