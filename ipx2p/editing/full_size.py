"""Finished edits at the size of the original (layer 3)."""

import time
from pathlib import Path

from PIL import Image
from torch import Tensor

from ipx2p.editing.settings import Edited
from ipx2p.errors import InputError
from ipx2p.images import pixels01_from_image
from ipx2p.names import check_names
from ipx2p.photos import Photo, read_photo
from ipx2p.transfer import carry_over

DEFAULT = "auto"


def transfer_name(full_size: bool | str) -> str | None:
    """The transfer that is meant: True is the default one; None for False.

    Raises: InputError for an unknown name, or what is neither a name nor a truth value.
    """
    if isinstance(full_size, bool):
        return DEFAULT if full_size else None
    if not isinstance(full_size, str):
        raise InputError(f"full_size is {full_size!r}, expected True, False or a transfer's name")
    check_names(transfer=full_size)
    return full_size


def edited_photo(
    original: Image.Image | str | Path, source: Image.Image, edited01: Tensor, name: str
) -> Photo:
    """The original at its full size and depth, with its metadata, and with the edit.

    Args:
        original: the picture or its path. source: its small copy as the model saw it.
        edited01: the edit of the copy, (3, h, w) in [0, 1]. name: of a transfer.
    """
    photo = read_photo(original)
    pixels = carry_over(photo.pixels, pixels01_from_image(source), edited01, name)
    return Photo(pixels, photo.icc_profile, photo.exif)


def at_full_size(
    edited: Edited, original: Image.Image | str | Path, source: Image.Image, name: str
) -> Edited:
    """An edit whose picture and pixels01 have become those of `edited_photo`, at its cost."""
    started_at = time.perf_counter()
    photo = edited_photo(original, source, edited.pixels01, name)
    image, pixels01 = photo.image, photo.pixels01
    seconds = edited.seconds + time.perf_counter() - started_at
    return edited._replace(image=image, pixels01=pixels01, photo=photo, seconds=seconds)
